"""Checkpoints as Qwen publishes them: configurations, shards, memory; and the way to the Hub, against a small one."""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import save_peer
from test_train import records, run  # noqa: F401  (records is a fixture)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import eval as evaluation
import lora
import train_grpo
import train_sft
import weights
from config import parse_arguments
from data import ImageConfig
from errors import InputError
from eval import Task, model_folder
from model import Policy
from weights import load_policy, published, read_config, read_eos_ids, save_policy

ROOT = Path(__file__).parent.parent

# The published config.json files, less what says nothing about the model (dropout, initialisation, versions).
IDS = dict(
    bos_token_id=151643, eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653,
    vision_token_id=151654, image_token_id=151655, video_token_id=151656,
)  # fmt: skip
COMMON = IDS | dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_act="silu",
    max_position_embeddings=128000, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=32768, torch_dtype="bfloat16",
    use_cache=True, use_sliding_window=False,
)  # fmt: skip
VISION = dict(
    depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3, patch_size=14,
    spatial_merge_size=2, spatial_patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2, temporal_patch_size=2,
)  # fmt: skip
PUBLISHED = {
    "3B": COMMON | dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        max_window_layers=70, tie_word_embeddings=True, vocab_size=151936,
        vision_config=VISION | {"out_hidden_size": 2048},
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    ),
    "7B": COMMON | dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_window_layers=28, tie_word_embeddings=False, vocab_size=152064,
        vision_config=VISION | {"out_hidden_size": 3584},
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    ),
    "32B": COMMON | dict(  # its vision_config leaves out what equals the defaults of transformers
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8,
        max_window_layers=64, tie_word_embeddings=False, vocab_size=152064, pad_token_id=151643,
        vision_config=dict(
            hidden_size=1280, in_chans=3, intermediate_size=3456, model_type="qwen2_5_vl", out_hidden_size=5120,
            spatial_patch_size=14, tokens_per_second=2, torch_dtype="bfloat16",
        ),
        rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    ),
}  # fmt: skip
PARAMETERS = {"3B": 3_754_622_976, "7B": 8_292_166_656}  # total_size of the published indexes, two bytes each
CARRIED = (  # beside weights and configuration: as published, then as transformers 5 has them
    "tokenizer.json tokenizer_config.json vocab.json merges.txt chat_template.json preprocessor_config.json "
    "generation_config.json chat_template.jinja processor_config.json video_preprocessor_config.json "
    "special_tokens_map.json added_tokens.json"
).split()
MB = 2**20


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes, by transformers' own model of a configuration. Nothing is allocated."""
    with torch.device("meta"):
        peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    names = {"model.language_model.": "model.", "model.visual.": "visual."}  # in memory -> on disk
    shapes = {}
    for name, parameter in peer.named_parameters():
        for here, there in names.items():
            name = there + name.removeprefix(here) if name.startswith(here) else name
        shapes[name] = tuple(parameter.shape)
    return shapes


def write_holes(folder: Path, config: dict, shard_bytes: int = 4 * 10**9) -> int:
    """The folder of a published checkpoint, bf16 and sharded, whose files have true headers and a hole where the
    weights would be -> how many files. Takes no room on the disk, and none in memory as long as no one reads it."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    shards: list[dict] = [{}]
    end = 0
    for name, shape in published_shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and end + size > shard_bytes:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    where = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(shard).encode()
        with open(file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + max(tensor["data_offsets"][1] for tensor in shard.values()))
        where |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return len(shards)


def resident() -> int:
    """Bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(size):
    with torch.device("meta"):
        ours = Policy(read_config(PUBLISHED[size]))
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == published_shapes(PUBLISHED[size])
    count = sum(p.numel() for p in ours.parameters())
    assert count == PARAMETERS.get(size, count) and (size != "32B" or 33.4e9 < count < 33.5e9)


@pytest.mark.parametrize("size", PUBLISHED)
def test_flat_and_nested_configurations_are_one(size, tmp_path):
    """As published, as transformers 5 writes it again, and as its predecessor did: nested with the flat keys beside."""
    flat = PUBLISHED[size]
    config = read_config(flat)
    Qwen2_5_VLConfig(**flat).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    assert read_config(nested) == read_config(flat | nested) == config
    assert (config.vision.depth, config.vision.num_heads, config.vision.window_size) == (32, 16, 112)
    assert config.vision.fullatt_block_indexes == (7, 15, 23, 31) and config.rope_theta == 1e6
    assert config.head_dim == 128 and config.mrope_section == (16, 24, 24) and config.rms_norm_eps == 1e-6


def test_a_quantised_checkpoint_is_refused():
    quantised = PUBLISHED["7B"] | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(InputError, match="config.json: has a quantization_config; take the checkpoint that is not"):
        read_config(quantised)


def test_eos_ids_are_those_of_the_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "do_sample": true}')
    assert read_eos_ids(tmp_path, PUBLISHED["3B"]) == (151645, 151643)
    (tmp_path / "generation_config.json").unlink()
    assert read_eos_ids(tmp_path, PUBLISHED["3B"]) == (151645,)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_32b_loads_on_the_meta_device_without_memory(tmp_path):
    """67 GB in 18 files, each of which is opened: every tensor finds its place, and none is read."""
    assert write_holes(tmp_path, PUBLISHED["32B"]) == 18 == len(weights.checkpoint_files(tmp_path))
    before = resident()
    policy = load_policy(tmp_path, "meta", torch.bfloat16)
    assert resident() - before < 200 * MB
    assert {name: tuple(p.shape) for name, p in policy.named_parameters()} == published_shapes(PUBLISHED["32B"])
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in policy.parameters())
    assert policy.eos_ids == (151645, 151643)
    (tmp_path / "model-00007-of-00018.safetensors").unlink()
    with pytest.raises(InputError, match="00007-of-00018.safetensors does not exist; the checkpoint is not whole"):
        load_policy(tmp_path, "meta", torch.bfloat16)
    shutil.rmtree(tmp_path)  # pytest would keep it, and a copy of /tmp might fill the holes


MEASURE = """
import os
import sys
from pathlib import Path
import torch
import weights

def status(key):  # bytes
    return 1024 * int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])

def measure(what):
    policy = weights.load_policy(folder) if what == "save" else None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak of the resident memory, starts anew
    start = status("VmRSS")
    if what == "save":
        weights.SHARD_BYTES = 50 * 10**6
        weights.save_policy(policy, folder / "again", torch.bfloat16)
    else:
        policy = weights.load_policy(folder, dtype=getattr(torch, what))
    print(what, status("VmHWM") - start, sum(p.nbytes for p in policy.parameters()), flush=True)

folder = Path(sys.argv[1])
torch.set_num_threads(1)
for what in ("float32", "bfloat16", "save"):
    if os.fork() == 0:  # each in a process of its own, with nothing left over from the one before
        measure(what)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """100 M random parameters in bf16, 200 MB in files of 50 MB."""
    folder = tmp_path_factory.mktemp("sharded")
    config = PUBLISHED["3B"] | dict(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=10, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=32768, image_token_id=5, eos_token_id=2, vision_config=VISION | dict(
            depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=768, fullatt_block_indexes=[1]
        ),
    )  # fmt: skip
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    with torch.device("meta"):
        policy = Policy(read_config(config))
    policy = policy.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in policy.parameters():
        parameter.data.normal_(0, 0.02)
    policy.raw_config = config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 50 * 10**6)
        save_policy(policy, folder)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) >= 4 and max(sizes) < 51 * 10**6 and sum(sizes) == pytest.approx(200e6, rel=0.1)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_and_saving_hold_the_model_and_one_shard(sharded):
    """The peak of the resident memory, pages of mapped files included (they count until their file is let go): what the
    policy's weights take and one shard of 50 MB, and 25 MB for allocators. All shards at once would be 150 MB more."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(sharded)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    for what, peak, held in (line.split() for line in done.stdout.splitlines()):
        there = 0 if what == "save" else int(held)  # before a save the weights are there already
        assert there + 30e6 < int(peak) < there + 50e6 + 25e6, done.stdout
    assert what == "save"


def test_the_reference_is_bfloat16_and_what_is_trained_float32():
    def dtypes(policy: Policy) -> set[tuple[torch.dtype, bool]]:
        return {(p.dtype, p.requires_grad) for p in policy.parameters()}

    flags = ["--recipe", "nano", "--dtype", "bfloat16", "--beta", "0.04", "--lora-rank"]
    whole, adapters = (
        train_grpo.make_policies(parse_arguments([*flags, rank]), evaluation.NANO, evaluation.NANO) for rank in "02"
    )
    assert dtypes(whole[0]) == {(torch.float32, True)} and dtypes(whole[2]) == {(torch.bfloat16, False)}
    assert dtypes(adapters[0]) == {(torch.bfloat16, False), (torch.float32, True)} and adapters[2] is adapters[0]


def test_names_of_transformers_memory_are_read_too(tmp_path):
    """What some frameworks write: the names that transformers 5 has in memory, not those on disk."""
    peer = save_peer(tmp_path)
    before = load_policy(tmp_path)
    weights = {name: p.detach().clone() for name, p in peer.named_parameters()}
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in weights)
    save_file(weights, tmp_path / "model.safetensors")
    after = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_weights_do_not_hang_on_the_file_that_they_came_from(tmp_path):
    """It may be overwritten or cut short while the policy is in use."""
    save_peer(tmp_path)
    policy = load_policy(tmp_path)
    before = [p.clone() for p in policy.parameters()]
    with open(tmp_path / "model.safetensors", "r+b") as file:
        length = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * length)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "..", "", 7])
def test_an_index_that_points_out_of_its_folder_is_refused(name, tmp_path):
    save_peer(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="field 'weight_map' must say which file of the folder each tensor is in"):
        load_policy(tmp_path)


# -------------------------------------------------------------------------------------------------------------- saving


@torch.no_grad()
def test_a_saved_folder_is_whole_and_loads_in_transformers(tmp_path, monkeypatch):
    """Several shards, adapters merged into them, in float32 where the base was bfloat16, under a nested configuration
    whose parts name their dtype too; and every companion is carried on."""
    base, saved = tmp_path / "base", tmp_path / "saved"
    save_peer(base)
    raw = json.loads((base / "config.json").read_text())
    raw["dtype"] = raw["text_config"]["dtype"] = raw["vision_config"]["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(raw))
    for name in set(CARRIED) - {"generation_config.json", "preprocessor_config.json"}:
        (base / name).write_text(json.dumps({"chat_template": name}))
    Qwen2VLImageProcessorPil(max_pixels=200_704).save_pretrained(base)
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    policy = load_policy(base)
    lora.add(policy, 2, 4.0, seed=0)
    for name, parameter in policy.adapters().items():
        parameter.normal_(0, 0.1) if name.endswith(".b") else None
    save_policy(policy, saved, torch.float32)

    assert len(list(saved.glob("model-*.safetensors"))) > 3 and not (saved / "model.safetensors").exists()
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    tensors = {name: t for file in saved.glob("*.safetensors") for name, t in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys() == dict(published(policy)).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name in CARRIED:
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    peer, told = Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(p.dtype == torch.float32 for p in peer.parameters())
    theirs = {name: p for name, p in load_policy(saved).named_parameters()}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in published(policy))
    assert peer.generation_config.eos_token_id == policy.eos_ids[0]
    processor = Qwen2VLImageProcessorPil.from_pretrained(saved)
    assert processor.size["longest_edge"] == ImageConfig.from_folder(saved).max_pixels == 200_704


# ------------------------------------------------------------------------------------------------------------- the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "qwen2_5_vl"}',
    "model.safetensors": b"weights",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit('code of a repository ran')",
    "README.md": b"# read me",
    "onnx/model.safetensors": b"another format",
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks a server for: the commit, the tree, each file."""

    requests: list[str] = []

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = urlparse(self.path).path
        self.requests.append(path)
        org, _, rest = path.removeprefix("/api/models/").removeprefix("/").partition("/")
        if org in ("gated", "missing"):
            status, code = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound")}[org]
            self.answer(status, X_Error_Code=code)
        elif rest.startswith("tiny/revision/"):
            if rest.endswith(("/main", COMMIT)):
                siblings = [{"rfilename": name} for name in REPOSITORY]
                self.answer(200, json.dumps({"id": "qwen/tiny", "sha": COMMIT, "siblings": siblings}).encode())
            else:
                self.answer(404, X_Error_Code="RevisionNotFound")
        elif rest.startswith("tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in REPOSITORY.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            body = REPOSITORY.get(rest.partition(COMMIT + "/")[2])
            if body is None:
                self.answer(404)
            else:
                self.answer(200, body, ETag=f'"{hash(body):x}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(home: Path, endpoint: str, *models: str, offline: bool = False, weights: bool = True) -> list[str]:
    """For each model what hub.fetch gives, a folder or a sentence. The client reads its settings when it is imported:
    so in a process of its own."""
    program = (
        "import sys, hub, errors\n"
        "for model in sys.argv[1:]:\n"
        f"    try: print(hub.fetch(model, {weights}))\n"
        "    except errors.InputError as error: print(error)\n"
    )
    environment = os.environ | {
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *models], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_repository_is_fetched_once_and_only_as_data(tmp_path):
    with serving() as endpoint:
        newest, pinned, other, gated, missing = ask(
            tmp_path, endpoint, "qwen/tiny", f"qwen/tiny@{COMMIT}", "qwen/tiny@v9", "gated/tiny", "missing/tiny"
        )
        asked = list(Hub.requests)
    folder = Path(newest)
    assert newest == pinned and folder.name == COMMIT and folder.is_relative_to(tmp_path)
    data = {"config.json", "model.safetensors", "merges.txt", "chat_template.jinja"}
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == data
    assert all((folder / name).read_bytes() == REPOSITORY[name] for name in data)
    assert not any(name in path for name in REPOSITORY.keys() - data for path in asked)
    sentence = "--model {}: no folder here, and cannot be had from the Hugging Face Hub ({}"
    assert other.startswith(sentence.format("qwen/tiny@v9", "it has no such commit, branch or tag); name a folder"))
    assert gated.startswith(sentence.format("gated/tiny", "its owners give access on request: ask on its page"))
    assert missing.startswith(sentence.format("missing/tiny", "the Hub has no such repository"))

    # Without a server, or told to stay offline: what is in the cache, and one sentence for what is not.
    for offline in (False, True):
        again, pinned, unknown = ask(
            tmp_path, endpoint, "qwen/tiny", f"qwen/tiny@{COMMIT}", "qwen/other", offline=offline
        )
        assert again == pinned == newest
        assert unknown.startswith(sentence.format("qwen/other", "the Hub cannot be reached from here, and the cache"))


def test_an_estimate_fetches_no_weights(tmp_path):
    with serving() as endpoint:
        (folder,) = ask(tmp_path, endpoint, "qwen/tiny", weights=False)
        assert {file.name for file in Path(folder).iterdir()} == {"config.json", "merges.txt", "chat_template.jinja"}
        assert not any("safetensors" in path for path in Hub.requests)
        assert ask(tmp_path, endpoint, "qwen/tiny") == [folder] and (Path(folder) / "model.safetensors").exists()


def test_what_is_a_name_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path / COMMIT))
    for path in (
        "nano",
        "Qwen",
        "./Qwen/tiny",
        "/Qwen/tiny",
        "../Qwen",
        "a/b/c",
        "~/x",
        "Qwen/tiny/",
        "C:\\a/b",
        "-a/b",
        "Qwen/tiny@../../y",
        "Qwen/tiny@a/../../y",
        "Qwen/tiny@/etc/passwd",
        "Qwen/tiny@a//b",
        "Qwen/tiny@..",
        "Qwen/tiny@a..b",
        "Qwen/tiny@.git",
        "Qwen/tiny@",
        "Qwen/..tiny",
        "Qwen/ti..ny",
        "Qwen/tiny\n",
        "Qwen/tiny@main\n",
        "Qwen/tiny@\x1b[31m",
        "",
    ):
        assert not hub.is_name(path) and model_folder(path) == (evaluation.NANO if path == "nano" else Path(path))
    assert not asked
    for name in (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "a/b",
        "Qwen/tiny@main",
        "Qwen/tiny@refs/pr/1",
        "a/b@v1.0-rc.1",
        f"Qwen/tiny@{COMMIT}",
    ):
        folder = model_folder(name)
        assert hub.is_name(name) and asked.pop() == name.partition("@")[0]
        assert hub.pinned(name, folder) == f"{name.partition('@')[0]}@{COMMIT}"
    # A folder here goes before, and so does one that lacks what is looked for: out/step-000100 is not asked for abroad.
    (tmp_path / "Qwen" / "tiny").mkdir(parents=True)
    for path in ("Qwen/tiny", "Qwen/other"):
        assert model_folder(path) == Path(path) and hub.pinned(path, Path(path)) == path
    assert not asked


def test_a_resumed_run_goes_on_with_the_commit_that_it_began_with(tmp_path, capsys):
    def resumed(saved: str, *flags: str) -> str:
        arguments = {"model": saved, "recipe": "paper"}
        (tmp_path / "config.json").write_text(json.dumps({"arguments": arguments}))
        return parse_arguments(["--resume", "--out", str(tmp_path), *flags]).model

    pinned = f"Qwen/tiny@{COMMIT}"
    assert resumed(pinned) == resumed(pinned, "--model", "Qwen/tiny") == resumed(pinned, "--model", pinned) == pinned
    for saved, given in [
        (pinned, "Qwen/other"),
        (pinned, "Qwen/tiny@v2"),
        ("runs/a@b", "runs/a"),
        ("nano", "Qwen/tiny"),
    ]:
        with pytest.raises(SystemExit):
            resumed(saved, "--model", given) if saved != "runs/a@b" else resumed("./" + saved, "--model", "./" + given)
        assert "--resume goes on with --model" in capsys.readouterr().err


def test_programs_take_a_name_and_save_its_commit(records, tmp_path, monkeypatch):  # noqa: F811
    """A run from the Hub, stopped and resumed by the same command; the second fetch asks for the first one's commit."""
    snapshot = tmp_path / "cache" / COMMIT
    shutil.copytree(evaluation.NANO, snapshot)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name, _: asked.append(name) or snapshot)
    name, pinned = "qwen/tiny", f"qwen/tiny@{COMMIT}"
    small = ["--model", name, "--data", str(records), "--batch-size", "2", "--micro-batch", "2", "--workers", "0"]
    run(train_sft, *small, "--steps", "1", "--out", str(tmp_path / "sft"))
    grpo = [*small, "--recipe", "nano", "--group-size", "2", "--max-tokens", "4", "--out", str(tmp_path / "grpo")]
    run(train_grpo, *grpo, "--steps", "1")
    run(train_grpo, *grpo, "--steps", "2", "--resume")
    assert asked == [name, name, pinned]
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["arguments"]["model"] == pinned
    assert json.loads((tmp_path / "grpo" / "config.json").read_text())["arguments"]["model"] == pinned
    image = ["--image", str(records.parent / "0.png"), "--query", "x", "--out", str(tmp_path / "eval")]
    run(evaluation, "--model", name, *image)
    assert asked.pop() == name


# ------------------------------------------------------------------------------------------------- no code from a disk


def test_nothing_that_a_folder_holds_is_run(tmp_path):
    """Code that a checkpoint names for its tokenizer is not imported; what a template may not do is one sentence."""
    folder = shutil.copytree(evaluation.NANO, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    evil = settings | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(evil))
    try:
        Task(load_policy(folder), folder, "answer")
    except InputError as error:
        assert "holds no tokenizer that transformers can load" in str(error)
    assert not (tmp_path / "ran").exists()
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": escape}))
    task = Task(load_policy(folder), folder, "answer")
    sample = evaluation.load_samples("phantoms", 0, "test")[0]
    with pytest.raises(InputError, match="the tokenizer's chat template fails .SecurityError"):
        task.prompt(sample)
