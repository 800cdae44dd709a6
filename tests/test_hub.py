"""Checkpoints as Qwen publishes them: configurations, shards, memory; and the way to the Hub, against a small one."""

import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from programs import records, run  # noqa: F401  (records is a fixture)
from safetensors.torch import load_file, save_file
from test_data import refused
from test_model import save_peer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import config
import eval as evaluation
import lora
import train_grpo
import train_sft
import weights
from data import load_samples
from errors import InputError
from images import ImageConfig
from model import Policy
from prompts import Processor
from tasks import TASKS
from weights import NANO, is_hub_name, load_policy, model_folder, pinned, published, read_config, save_policy

# The published config.json files, less what says nothing about the model (dropout, initialisation, versions).
COMMON = dict(
    bos_token_id=151643, eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653,
    vision_token_id=151654, image_token_id=151655, video_token_id=151656, hidden_act="silu", model_type="qwen2_5_vl",
    architectures=["Qwen2_5_VLForConditionalGeneration"], max_position_embeddings=128000, rms_norm_eps=1e-6,
    rope_theta=1e6, sliding_window=32768, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
)  # fmt: skip
VISION = dict(
    depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3, patch_size=14,
    spatial_merge_size=2, spatial_patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2, temporal_patch_size=2,
)  # fmt: skip
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_window_layers "
KEYS = (KEYS + "tie_word_embeddings vocab_size").split()
SIZES = {"3B": (2048, 11008, 36, 16, 2, 70, True, 151936), "7B": (3584, 18944, 28, 28, 4, 28, False, 152064)}
SIZES["32B"] = (5120, 27648, 64, 40, 8, 64, False, 152064)
PUBLISHED = {
    size: COMMON | dict(zip(KEYS, row, strict=True)) | {"vision_config": VISION | {"out_hidden_size": row[0]}}
    for size, row in SIZES.items()
}
for name in set(VISION) - {"hidden_size", "in_chans", "spatial_patch_size", "tokens_per_second"}:
    del PUBLISHED["32B"]["vision_config"][name]  # it leaves out what equals the defaults of transformers
PUBLISHED["32B"]["vision_config"] |= dict(intermediate_size=3456, model_type="qwen2_5_vl", torch_dtype="bfloat16")
PUBLISHED["32B"]["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
SMALL = PUBLISHED["7B"] | dict(num_hidden_layers=2, vision_config=PUBLISHED["7B"]["vision_config"] | {"depth": 2})
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def in_child(work):
    """What work() returns, in a forked process: with an environment, modules and a peak of memory of its own."""
    here, there = os.pipe()
    if os.fork() == 0:
        try:
            os.write(there, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(here) as answer:
        said = answer.read()
    os.wait()
    return json.loads(said)


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes, by transformers' own model of a configuration. Nothing is allocated."""
    with torch.device("meta"):
        peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    names = {name: name.removeprefix("model.").replace("language_model.", "model.") for name in peer.state_dict()}
    return {names[name]: tuple(parameter.shape) for name, parameter in peer.named_parameters()}


def write_holes(folder: Path, config: dict, shard_bytes: int, eos=(151645, 151643)) -> int:
    """The folder of a published checkpoint, bf16 and sharded, whose files have true headers and a hole where the
    weights would be -> how many files. Takes no room on the disk, and none in memory as long as no one reads it."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    shards, end, where = [], shard_bytes, {}
    for name, shape in published_shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        if end + size > shard_bytes:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + size]}
    for number, shard in enumerate(shards, 1):
        file, header = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", json.dumps(shard).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(file, 8 + len(header) + max(tensor["data_offsets"][1] for tensor in shard.values()))
        where |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return len(shards)


def status(key: str) -> int:
    """Bytes of this process: VmRSS, its peak VmHWM, or RssAnon, that no file stands behind."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_configurations_flat_and_nested(size, tmp_path):
    """As published, as transformers 5 writes it again, and as its predecessor did: nested with the flat keys beside."""
    flat = PUBLISHED[size]
    config = read_config(flat)
    with torch.device("meta"):
        ours = Policy(config)
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == published_shapes(flat)
    Qwen2_5_VLConfig(**flat).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    assert read_config(nested) == read_config(flat | nested) == config
    assert (config.vision.depth, config.vision.num_heads, config.vision.window_size) == (32, 16, 112)
    assert config.vision.fullatt_block_indexes == (7, 15, 23, 31) and config.rope_theta == 1e6
    assert config.head_dim == 128 and config.mrope_section == (16, 24, 24) and config.rms_norm_eps == 1e-6
    for raw in (flat, nested):  # without a generation_config.json
        assert weights.read_eos_ids(tmp_path, raw) == (151645,)
    quantised = flat | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    refused("config.json: has a quantization_config; take the checkpoint that is not", read_config, quantised)


@on_linux
@pytest.mark.parametrize("size, files", [("two layers", 4), pytest.param("32B", 18, marks=pytest.mark.slow)])
def test_a_published_checkpoint_loads_on_the_meta_device_without_memory(size, files, tmp_path):
    """32B: 67 GB in 18 files. Every tensor finds its place, and none is read."""
    raw = PUBLISHED.get(size, SMALL)
    assert write_holes(tmp_path, raw, 4 * 10**9 if size == "32B" else 1_250_000_000) == files
    before = status("RssAnon")
    policy = load_policy(tmp_path, "meta", torch.bfloat16)
    assert status("RssAnon") - before < 200e6
    assert {name: tuple(p.shape) for name, p in policy.named_parameters()} == published_shapes(raw)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in policy.parameters())
    assert policy.eos_ids == (151645, 151643)
    (tmp_path / f"model-00002-of-{files:05d}.safetensors").unlink()
    refused("00002-of-.*.safetensors does not exist; the checkpoint is not whole", load_policy, tmp_path, "meta")
    shutil.rmtree(tmp_path)  # pytest would keep it, and a copy of /tmp might fill the holes


@pytest.mark.slow
@on_linux
def test_loading_and_saving_hold_the_model_and_one_shard(tmp_path, monkeypatch):
    """The peak of the resident memory, pages of mapped files included (they count until their file is let go), of 100 M
    parameters in bf16, 200 MB in files of 50 MB: what the policy's weights take and one shard, and 25 MB for
    allocators. All shards at once would be 150 MB more."""
    vision = VISION | dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=768)
    row = dict(zip(KEYS, (768, 2304, 10, 6, 2, 28, True, 32768), strict=True))
    raw = COMMON | row | dict(image_token_id=5, eos_token_id=2, vision_config=vision | {"fullatt_block_indexes": [1]})
    monkeypatch.setattr(weights, "SHARD_BYTES", 50 * 10**6)

    def work(what: str) -> list:
        policy = load_policy(tmp_path) if what == "save" else None
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak of the resident memory, starts anew
        start = status("VmRSS")
        if policy:
            save_policy(policy, tmp_path / "again", torch.bfloat16)
        else:
            policy = load_policy(tmp_path, dtype=getattr(torch, what))
        return [status("VmHWM") - start, sum(p.nbytes for p in policy.parameters())]

    write_holes(tmp_path, raw, 50 * 10**6, eos=2)
    for what in ("float32", "bfloat16", "save"):
        most, held = in_child(lambda what=what: work(what))
        there = 0 if what == "save" else held  # before a save the weights are there already
        assert there + 30e6 < most < there + 50e6 + 25e6, (what, most, held)
    sizes = [file.stat().st_size for file in (tmp_path / "again").glob("*.safetensors")]
    assert len(sizes) >= 4 and max(sizes) < 51e6 and sum(sizes) == pytest.approx(200e6, rel=0.1)


def test_the_reference_is_bfloat16_and_what_is_trained_float32():
    def dtypes(rank: str) -> list[set]:
        args = config.parse("train_grpo.py", ["--recipe", "nano", "--beta", "0.04", "--lora-rank", rank])
        args.dtype = "bfloat16"
        policies = train_grpo.make_policies(args, NANO, NANO)
        return [{(p.dtype, p.requires_grad) for p in policy.parameters()} for policy in (policies[0], policies[2])]

    base, trained = (torch.bfloat16, False), (torch.float32, True)
    assert dtypes("0") == [{trained}, {base}] and dtypes("2") == [{base, trained}] * 2  # adapters: one policy for both


def test_names_of_transformers_memory_are_read_too_and_no_weight_hangs_on_its_file(tmp_path):
    """Some frameworks write the names that transformers 5 has in memory. A file may be overwritten while the policy is
    in use."""
    peer = save_peer(tmp_path)
    before = load_policy(tmp_path)
    tensors = {name: p.detach().clone() for name, p in peer.named_parameters()}
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    after = load_policy(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    for name in ("../model.safetensors", "/model.safetensors", "..", "", 7):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused("field 'weight_map' must say which file of the folder each tensor is in", load_policy, tmp_path)


@torch.no_grad()
def test_a_saved_folder_is_whole_and_loads_in_transformers(tmp_path, monkeypatch):
    """Several shards, adapters merged into them, in float32 where the base was bfloat16, under a nested configuration
    whose parts name their dtype too; and every companion is carried on."""
    base, saved = tmp_path / "base", tmp_path / "saved"
    save_peer(base)
    raw = json.loads((base / "config.json").read_text())
    raw["dtype"] = raw["text_config"]["dtype"] = raw["vision_config"]["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(raw))
    for name in set(weights.COMPANIONS) - {"generation_config.json", "preprocessor_config.json"}:
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
    for name in weights.COMPANIONS:
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    peer, told = Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(p.dtype == torch.float32 for p in peer.parameters())
    theirs = dict(load_policy(saved).named_parameters())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in published(policy))
    assert peer.generation_config.eos_token_id == policy.eos_ids[0]
    processor = Qwen2VLImageProcessorPil.from_pretrained(saved)
    assert processor.size["longest_edge"] == ImageConfig.from_folder(saved).max_pixels == 200_704


COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {"config.json": b'{"model_type": "qwen2_5_vl"}', "merges.txt": b"a b"}
WANTED |= {"chat_template.jinja": b"{{ messages }}", "model.safetensors": b"weights"}
REPOSITORY = WANTED | {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit('code of a repository ran')"}
REPOSITORY |= {"README.md": b"# read me", "onnx/model.safetensors": b"another format"}
TOLD = {"id": "qwen/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in REPOSITORY]}
TREE = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in REPOSITORY.items()]
ANSWERS = {f"/qwen/tiny/resolve/{COMMIT}/{name}": content for name, content in REPOSITORY.items()}
ANSWERS |= {f"/api/models/qwen/tiny/revision/{name}": json.dumps(TOLD).encode() for name in ("main", COMMIT)}
ANSWERS[f"/api/models/qwen/tiny/tree/{COMMIT}"] = json.dumps(TREE).encode()
ERRORS = {"/gated/": (403, "GatedRepo"), "/missing/": (404, "RepoNotFound"), "": (404, "RevisionNotFound")}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks a server for: the commit, the tree, each file."""

    requests: list[str] = []

    def do_GET(self):
        path = urlparse(self.path).path
        self.requests.append(path)
        body = ANSWERS.get(path, b"")
        status, error = (200, None) if body else next(ERRORS[part] for part in ERRORS if part in path)
        headers = {"X-Error-Code": error} if error else {"ETag": f'"{hash(body):x}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Hub.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(home: Path, endpoint: str, *models: str, offline: bool = False, weights: bool = True) -> list[str]:
    """For each model what weights.fetch gives, a folder or a sentence. The client reads its settings when it is
    imported: so in a process that imports it anew."""

    def work() -> list[str]:
        os.environ |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_ENDPOINT": endpoint}
        os.environ |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
        for name in [name for name in sys.modules if name.split(".")[0] in ("huggingface_hub", "weights")]:
            del sys.modules[name]
        import weights as anew

        def fetch(model: str) -> str:
            try:
                return str(anew.fetch(model, weights))
            except InputError as error:
                return str(error)

        return list(map(fetch, models))

    return in_child(work)


def test_a_repository_is_fetched_once_and_only_as_data(tmp_path, endpoint):
    (folder,) = ask(tmp_path, endpoint, "qwen/tiny", weights=False)  # as for an estimate
    folder, both = Path(folder), ("qwen/tiny", f"qwen/tiny@{COMMIT}")
    assert {file.name for file in folder.iterdir()} == WANTED.keys() - {"model.safetensors"}
    assert not any("safetensors" in path for path in Hub.requests)
    *found, other, gated, missing = ask(tmp_path, endpoint, *both, "qwen/tiny@v9", "gated/tiny", "missing/tiny")
    assert found == [str(folder)] * 2 and folder.name == COMMIT and folder.is_relative_to(tmp_path)
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == WANTED.keys()
    assert all((folder / name).read_bytes() == content for name, content in WANTED.items())
    assert not any(name in path for name in REPOSITORY.keys() - WANTED.keys() for path in Hub.requests)
    sentence = "--model {}: no folder here, and cannot be had from the Hugging Face Hub ({}"
    assert other.startswith(sentence.format("qwen/tiny@v9", "it has no such commit, branch or tag); name a folder"))
    assert gated.startswith(sentence.format("gated/tiny", "its owners give access on request: ask on its page"))
    assert missing.startswith(sentence.format("missing/tiny", "the Hub has no such repository"))
    # Without a server, or told to stay offline: what is in the cache, and one sentence for what is not.
    for where, offline in ((endpoint, True), ("http://127.0.0.1:9", False)):
        *found, unknown = ask(tmp_path, where, *both, "qwen/other", offline=offline)
        assert found == [str(folder)] * 2
        assert unknown.startswith(sentence.format("qwen/other", "the Hub cannot be reached from here, and the cache"))


PATHS = ["nano", "Qwen", "./Qwen/tiny", "/Qwen/tiny", "../Qwen", "a/b/c", "~/x", "Qwen/tiny/", "C:\\a/b", "-a/b", ""]
PATHS += ["Qwen/tiny" + end for end in "@ @.. @../../y @a/../../y @/etc/passwd @a//b @a..b @.git \n @main\n".split(" ")]
PATHS += ["Qwen/..tiny", "Qwen/ti..ny", "Qwen/tiny@\x1b[31m"]
NAMES = f"Qwen/Qwen2.5-VL-3B-Instruct a/b Qwen/tiny@main Qwen/tiny@refs/pr/1 a/b@v1.0-rc.1 a/b@{COMMIT}".split()


def test_what_is_a_name_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(weights, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / COMMIT))
    for path in PATHS:
        assert not is_hub_name(path) and pinned(path, Path(path)) == path
        if path != "nano":
            refused("config.json does not exist; --model wants a folder of a Qwen2.5-VL", model_folder, path)
    assert model_folder("nano") == NANO and not asked
    for name in NAMES:
        folder = model_folder(name)
        assert is_hub_name(name) and asked.pop() == name.partition("@")[0]
        assert pinned(name, folder) == f"{name.partition('@')[0]}@{COMMIT}"
    # A folder here goes before, and so does one that lacks what is looked for: out/step-000100 is not asked for abroad.
    shutil.copytree(NANO, tmp_path / "Qwen" / "tiny")
    assert model_folder("Qwen/tiny") == Path("Qwen/tiny") and pinned("Qwen/tiny", Path("Qwen/tiny")) == "Qwen/tiny"
    refused("Qwen/other/config.json does not exist", model_folder, "Qwen/other")
    assert not asked


def test_programs_take_a_name_and_save_its_commit(records, tmp_path, monkeypatch):  # noqa: F811
    """A run from the Hub, stopped and resumed by the same command; the second fetch asks for the first one's commit."""
    snapshot, asked = tmp_path / "cache" / COMMIT, []
    shutil.copytree(NANO, snapshot)
    monkeypatch.setattr(weights, "fetch", lambda name, _: asked.append(name) or snapshot)
    name, commit = "qwen/tiny", f"qwen/tiny@{COMMIT}"
    small = ["--model", name, "--data", str(records), "--batch-size", "2", "--micro-batch", "2", "--workers", "0"]
    run(train_sft, *small, "--steps", "1", "--out", str(tmp_path / "sft"))
    grpo = [*small, "--recipe", "nano", "--group-size", "2", "--max-tokens", "4", "--out", str(tmp_path / "grpo")]
    run(train_grpo, *grpo, "--steps", "1")
    run(train_grpo, *grpo, "--steps", "2", "--resume")
    assert asked == [name, name, commit]
    for folder in ("sft", "grpo"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["arguments"]["model"] == commit
    image = ["--image", str(records.parent / "0.png"), "--query", "x", "--out", str(tmp_path / "eval")]
    run(evaluation, "--model", name, *image)
    assert asked.pop() == name


def test_nothing_that_a_folder_holds_is_run(tmp_path):
    """Code that a checkpoint names for its tokenizer is not imported; what a template may not do is one sentence."""
    folder = shutil.copytree(NANO, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    evil = settings | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(evil))
    with suppress(InputError):  # some versions have another class for it, others none
        Processor(folder, "answer", TASKS)
    assert not (tmp_path / "ran").exists()
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": escape}))
    processor, sample = Processor(folder, "answer", TASKS), load_samples("phantoms", TASKS, 0, "test")[0]
    refused("the tokenizer's chat template fails .SecurityError", processor.prompt, sample)
