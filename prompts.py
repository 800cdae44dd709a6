"""Pictures, clips and phrases -> prompts: the tokenizer, the chat, the wording of a question, M-RoPE positions.

Conventions are Qwen2.5-VL's: ids are those of transformers' chat template, positions those of its get_rope_index (of a
clip vLLM's); tests/ holds both. What a question says is its task's to decide (tasks/); here it is put behind a picture
or a clip and tokenized. Nothing in the text says how fast a clip is: that is in the positions (mrope_positions).

Left out: several pictures a prompt, augmentation. Nothing is truncated: a prompt that is too long is an InputError.
"""

import faulthandler
import json
import math
import os
import re
import signal
import string
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ranks
from data import HALF, MAX_TEXT, BadRecords
from errors import InputError, cause_of, named, one_line, read_object, read_text, short
from images import RESTORE, ImageConfig, Sample, View, load, read_picture
from weights import COMPANIONS, read_config

STYLES = ("answer", "think", "qwen")  # wordings that every task has: the bare answer, a thought before it, Qwen's own
PROMPT_FILE = "medloc.json"  # in a checkpoint folder of ours: which prompt the policy is used to, by name or in full
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"  # names, never ids: the nano policy has ids of its own
KINDS = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}  # as chat templates call them
MAX_CHAT = 10 * MAX_TEXT  # characters of a rendered chat: query and question have MAX_TEXT at most, each
TRIAL = 5, 2**31  # seconds of a CPU and bytes that a checkpoint's template and tokenizer may take for the text below
TRIAL_TEXT = string.printable + "Please provide the bounding box coordinate of the region: " + "a" * 64
CHAT = (  # for a tokenizer without a template of its own: what Qwen2.5-VL's template renders
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


def prompt_style(value: str) -> str:
    """--prompt -> what all of this takes as `style`: one of STYLES, or a question with {query} in it, which is the text
    of the file that --prompt names."""
    if value in STYLES:
        return value
    if not os.path.isfile(value):
        known = ", ".join(STYLES)
        raise InputError(f"--prompt {one_line(value)}: there are {known}, or a text file with {{query}} in it")
    with named(f"--prompt {one_line(value)}"):
        return check_style(read_text(value, "write it in UTF-8").strip())


def check_style(style: str) -> str:
    """The style, if it can be asked. {query} is the only placeholder: {"bbox_2d": [x1, y1, x2, y2]} is text."""
    if style in STYLES:
        return style
    if len(style) > MAX_TEXT:
        raise InputError(f"the question has {len(style)} characters; shorten it to at most {MAX_TEXT}")
    if other := [p for p in re.findall(r"\{\s*\w*\s*\}", style) if p != "{query}"]:
        raise InputError(f"the question holds {other[0]}; {{query}} is the only placeholder there is")
    if "{query}" not in style:
        hint = f"write it where the phrase of a record belongs, or name one of {', '.join(STYLES)}"
        raise InputError(f"the question {short(style)} does not hold {{query}}; {hint}")
    if re.search(HALF, style):
        raise InputError(f"the question {short(style)} holds half a surrogate pair; write the whole character")
    for token in (IMAGE_TOKEN, VIDEO_TOKEN):
        if token in style:
            raise InputError(f"the question holds {token}; leave it out, the picture is put in front of it")
    return style


def default_prompt(folder: Path) -> str:
    """The prompt a policy was trained with, if its folder says so (the nano one's does); else the paper's, think."""
    file = folder / PROMPT_FILE
    style = read_object(file, RESTORE).get("prompt") if os.path.lexists(file) else "think"
    with named(f"{one_line(file)}: field 'prompt'"):
        if not isinstance(style, str):
            raise InputError(f"must be a string, not {short(style)}")
        return check_style(style)


@dataclass
class Prompt:
    """What the model is asked about one sample."""

    ids: torch.Tensor  # (P,) int64, the image token, or the clip's, repeated once per merged patch
    patches: torch.Tensor  # (t*gh*gw, C*T*p*p) float32
    grid: tuple[int, int, int]  # (t, gh, gw) in patches; t: 1 of a picture, frames / T of a clip
    positions: torch.Tensor  # (3, P) int64: M-RoPE time, row, column
    next_position: int  # of the first completion token: largest position + 1
    scale: tuple[float, float]  # model frame * scale = original frame
    size: tuple[int, int]  # (width, height) of the picture in the original frame
    target: Any  # of the sample's task, in the original frame
    sample: Sample
    text: str  # the rendered chat, with one image token
    image_tokens: torch.Tensor | None = (
        None  # (t*gh*gw/4, H) once a frozen vision tower has seen it: Policy.cache_image_tokens
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, with the chat template that transformers' processor would take; local
    files only, no code from the folder is run."""
    folder, shown = Path(folder), one_line(folder)
    if not folder.is_dir():
        raise InputError(f"{shown} is not a folder; a model is a Hugging Face checkpoint folder on this machine")
    if not os.path.lexists(folder / "tokenizer.json"):  # transformers would look for other kinds of files
        raise InputError(f"{shown}: holds no tokenizer.json; restore it from its checkpoint")
    for file in (*(folder / name for name in COMPANIONS), *folder.glob("additional_chat_templates/*")):
        if os.path.lexists(file):  # transformers would wait at a pipe, and read a device until the memory ends
            read_text(file, RESTORE)
    config = read_object(folder / "config.json", RESTORE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a broken tokenizer.json: whatever the first thing that it misses raises
        why = f"{type(error).__name__}: {cause_of(error)}"
        raise InputError(f"{shown}: holds no tokenizer that transformers can load ({why}); restore it") from error
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise InputError(f"{shown}: its tokenizer has no {IMAGE_TOKEN}; a Qwen2.5-VL checkpoint is needed")
    ids = vocabulary[IMAGE_TOKEN], config.get("image_token_id")
    if ids[0] != ids[1]:
        raise InputError(
            f"{shown}: {IMAGE_TOKEN} is {ids[0]} in the tokenizer, but config.json: image_token_id is {short(ids[1])}"
        )
    text_config = config.get("text_config")
    rows = (text_config if isinstance(text_config, dict) and text_config else config).get("vocab_size")
    if type(rows) is int and (last := max(vocabulary.values())) >= rows:
        raise InputError(f"{shown}: the tokenizer has a token {last}, but config.json: vocab_size is {short(rows)}")
    template, place = tokenizer.chat_template, folder / "tokenizer_config.json"
    if isinstance(template, dict):  # several, by name
        template = template.get("default", template)
    if os.path.lexists(file := folder / "chat_template.json"):  # a processor's, and goes before the tokenizer's own
        template, place = read_object(file, RESTORE).get("chat_template", {}), file
    if not isinstance(template, str | None):
        raise InputError(f"{one_line(place)}: field 'chat_template' must be a string; restore it from its checkpoint")
    tokenizer.chat_template = template
    _try_out(tokenizer, shown)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Ask one question in a forked process that may take TRIAL seconds of a CPU and bytes of memory. InputError if it
    takes more, or dies of it.

    A chat template is a program, if one in a sandbox, and a tokenizer's rules may make a long text of a short one: both
    can be endless, in C and Rust too, where no signal is heard. Any other fault is said at the first record. Not found
    is what is endless for certain records only; of these, no rendered question may be longer than MAX_CHAT. Where there
    is no fork (Windows), nothing is tried.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has no need of
        child = os.fork()
    if child == 0:
        done = 1
        try:
            signal.alarm(60)  # should it wait for a lock that a thread of the parent held: that says nothing
            _limit(*TRIAL)
            ids = tokenizer.encode(_chat(TRIAL_TEXT, tokenizer), add_special_tokens=False)
            tokenizer.batch_decode([ids])
            done = 0
        except InputError as error:
            done = int(isinstance(error.__cause__, MemoryError))
        except Exception as error:
            done = int(isinstance(error, MemoryError))
        finally:
            os._exit(done)  # nothing of the parent's is flushed or ended a second time
    status = os.waitpid(child, 0)[1]
    if status and os.WTERMSIG(status) != signal.SIGALRM:
        raise InputError(
            f"{folder}: its tokenizer or its chat template takes more than {TRIAL[0]} seconds or "
            f"{TRIAL[1] / 2**30:.2g} GB for a short question; restore them from their checkpoint"
        )


def _limit(seconds: int, memory: int) -> None:
    """Seconds of the CPU and more bytes of memory for this process, which says nothing more."""
    import resource  # not on Windows

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread per core would take memory of its own
    faulthandler.disable()  # of pytest's, which would tell of the child's end on a copy of standard error
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = [(resource.RLIMIT_CPU, seconds)]
    if os.path.isfile("/proc/self/statm"):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits.append((resource.RLIMIT_AS, held + memory))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


class Processor:
    """Samples -> prompts, and tokens -> texts: the tokenizer, the picture's limits and the wording of the questions. No
    policy is in it."""

    def __init__(
        self,
        folder: Path,  # of a checkpoint
        style: str,  # see prompt_style
        tasks: Mapping[str, Any],  # tasks.TASKS: they word the question
        max_prompt_tokens: int | None = None,
        max_pixels: int | None = None,  # of the model frame; None: what the folder says
    ):
        self.folder, self.style, self.tasks, self.max_prompt_tokens = Path(folder), style, tasks, max_prompt_tokens
        self.tokenizer = load_tokenizer(folder)
        self.image_config = ImageConfig.from_folder(folder, max_pixels=max_pixels)

    def prompt(self, sample: Sample, view: View | InputError | None = None) -> Prompt:
        """The question about a sample's picture, image first. view: what loading it ahead of time gave; without, the
        picture is read here. InputError, never a cut prompt, when it is longer than max_prompt_tokens or the query
        holds a special token."""
        view = view or self.image_config.view(read_picture(sample, *self.image_config.limits))
        if isinstance(view, InputError):
            raise view
        text, ids = self._render(sample, view.size)
        ids, pad = torch.tensor(ids), self.tokenizer.convert_tokens_to_ids(KINDS[sample.kind])
        tick = view.seconds * self.tokens_per_second if view.seconds else 0.0
        positions, next_position = mrope_positions(ids, [view.grid], (pad,), self.image_config.merge_size, [tick])
        patches = torch.from_numpy(view.patches)
        return Prompt(
            ids, patches, view.grid, positions, next_position, view.scale, view.size, view.target, sample, text
        )

    def check(self, sample: Sample, decode: bool = False) -> int:
        """The prompt's length in tokens, or the InputError that prompt() would raise. Known from size and query alone;
        with decode the picture is looked at too."""
        size = sample.displayed
        if decode or size is None:
            size = load(sample)[0].size
        return len(self._render(sample, size)[1])

    @cached_property
    def tokens_per_second(self) -> int:
        """The policy's clock: how many positions of M-RoPE a second is. InputError if its folder knows no clips."""
        name, raw = one_line(self.folder / "config.json"), read_object(self.folder / "config.json", RESTORE)
        config, token = read_config(raw, name), self.tokenizer.get_vocab().get(VIDEO_TOKEN)
        if token is None or token != config.video_token_id:
            raise InputError(
                f"{name}: video_token_id is {short(raw.get('video_token_id'))}, but {VIDEO_TOKEN} is {token} in the "
                "tokenizer; clips need both, as published"
            )
        if "tokens_per_second" not in raw["vision_config"]:
            ranks.print0(
                f"{name}: vision_config has no tokens_per_second; {config.vision.tokens_per_second}, as published"
            )
        return config.vision.tokens_per_second

    def usable(self, samples: list[Sample], bad: BadRecords, decode: bool = False) -> list[Sample]:
        """The samples that prompt() accepts, found without decoding their pictures unless asked to; `bad` takes the
        others, or ends the run."""
        kept, known = [], set()  # phantoms ask one question of one size twenty thousand times
        for sample in samples:
            key = (sample.query, sample.size, sample.task, sample.frames, sample.kind)
            try:
                if key not in known or (decode and sample.size):
                    self.check(sample, decode)
            except InputError as error:
                bad.add(sample.source, error)
            else:
                known.add(key)
                kept.append(sample)
        if samples and not kept:
            raise InputError(
                f"none of {len(samples)} records can be used; the first: {bad.sentences[samples[0].source]}"
            )
        return kept

    def texts(self, ids: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        """ids (N, T), lengths (N,) -> N texts, special tokens such as the final EOS left out."""
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Into a policy's saved folder: the size of the pictures it has seen, and the prompt that it is used to."""
        self.image_config.write_max_pixels(folder)
        (folder / PROMPT_FILE).write_text(json.dumps({"prompt": self.style}) + "\n")

    def _render(self, sample: Sample, size: tuple[int, int]) -> tuple[str, list[int]]:
        """The rendered chat and its ids (P,); size: (width, height) of the picture, original frame."""
        tokenizer, field, media = self.tokenizer, sample.query_field, sample.media_field
        kind = sample.kind
        with named(sample.source):
            with named(f"field {media!r}"):
                image_tokens = self.image_config.tokens(size, sample.frames)
                if kind == "video":
                    self.tokens_per_second  # noqa: B018  (refuses a checkpoint that knows no clips)
            pad_id = tokenizer.convert_tokens_to_ids(KINDS[kind])
            added = tokenizer.get_added_vocab()
            if special := [token for token in added if token in sample.query]:
                raise InputError(
                    f"field {field!r} {short(sample.query)} holds the special token {special[0]}; remove it"
                )
            question = self.tasks[sample.task].question(self.style)
            text, ids = _asked(sample.query, question, tokenizer, kind)
            # The words around a query may make a special token of one that holds none: <|im_{query} and end|>.
            if _specials(ids, added) != _neutral(tokenizer, tokenizer.chat_template, question, kind):
                raise InputError(
                    f"field {field!r} {short(sample.query)} makes a special token together with the question around "
                    "it; reword one of them"
                )
            if ids.count(pad_id) != 1:
                raise InputError(
                    f"the tokenizer's chat template writes {ids.count(pad_id)} {kind} tokens for one {kind}; "
                    "use the template of a Qwen2.5-VL checkpoint"
                )
            at, most = ids.index(pad_id), self.max_prompt_tokens
            ids[at : at + 1] = [pad_id] * image_tokens
            if most is not None and len(ids) > most:
                raise InputError(
                    f"the prompt has {len(ids)} tokens ({image_tokens} for field {media!r}, the rest for the template "
                    f"and field {field!r}), but {most} are allowed; lower --max-pixels or --max-tokens or shorten the "
                    "query"
                )
        return text, ids


def _asked(query: str, question: str, tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[str, list[int]]:
    """The rendered chat and its ids, before the token of the image, or of the clip, is repeated. kind: image, video."""
    text = _chat(question.replace("{query}", query), tokenizer, kind)
    try:
        return text, tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:
        raise InputError(f"the tokenizer fails ({cause_of(error)}); use a Qwen2.5-VL checkpoint's") from error


def _specials(ids: list[int], added: dict[str, int]) -> list[int]:
    """Those of the tokenizer's added tokens, in their order."""
    special = set(added.values())
    return [i for i in ids if i in special]


@lru_cache(maxsize=16)
def _neutral(tokenizer: PreTrainedTokenizerBase, template: str | None, question: str, kind: str) -> list[int]:
    """Those of a question about "x"; template: the tokenizer's, so that another one is another key of the cache."""
    return _specials(_asked("x", question, tokenizer, kind)[1], tokenizer.get_added_vocab())


def _chat(question: str, tokenizer: PreTrainedTokenizerBase, kind: str = "image") -> str:
    if tokenizer.chat_template is None:
        return CHAT.format(question=question, pad=KINDS[kind])
    turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
    try:
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program, if one in a sandbox: it may raise anything
        why = f"{type(error).__name__}: {cause_of(error)}"
        raise InputError(f"the tokenizer's chat template fails ({why}); use a Qwen2.5-VL checkpoint's") from error
    if len(text) > MAX_CHAT or re.search(HALF, text):
        what = f"{len(text)} characters" if len(text) > MAX_CHAT else "half a surrogate pair"
        raise InputError(f"the tokenizer's chat template writes {what} for a question; use a Qwen2.5-VL checkpoint's")
    return text


def mrope_positions(
    ids: torch.Tensor,
    grids: list[tuple[int, int, int]],
    pads: tuple[int, ...],
    merge_size: int,
    ticks: list[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """ids (P,), one grid (t, gh, gw) in patches per image or clip -> positions (3, P) and the position after the last.

    pads: ids of the tokens that stand for them. ticks: of each, positions from one of its t to the next (seconds times
    tokens_per_second); None: stills, whose t is 1.

    Text counts on in all three rows alike; an image's tokens are (time, row, column) of the merged grid, offset by the
    running position, which goes on behind the largest of them (Qwen2-VL, arXiv 2409.12191, section 2.1). A clip's time
    is trunc(i * tick) (Qwen2.5-VL, 2502.13923, section 2.1.3), in fp32. So does vLLM; transformers 4 rounds the seconds
    down first, and 5.24 lets the text behind a clip go on inside the clip's time.
    """
    is_image = torch.isin(ids, torch.tensor(pads))
    sizes = [(t, gh // merge_size, gw // merge_size) for t, gh, gw in grids]
    if int(is_image.sum()) != sum(map(math.prod, sizes)):
        raise ValueError(f"{int(is_image.sum())} image tokens in the prompt, but the grids {grids} make another number")
    parts, at, position = [], 0, 0  # at: index of the next token; position: its running position
    for size, tick in zip(sizes, ticks or [0.0] * len(sizes), strict=True):
        start = at + int(is_image[at:].int().argmax())  # first image token from here on
        text = torch.arange(position, position + start - at).expand(3, -1)
        position += start - at
        at = start + math.prod(size)
        if not is_image[start:at].all():
            raise ValueError(f"the image tokens from index {start} on are fewer than the grid {size} needs")
        time = (torch.arange(size[0]) * tick).long()
        cells = torch.cartesian_prod(time, *map(torch.arange, size[1:])).T  # (3, t*h*w), the column fastest
        parts += [text, cells + position]
        position += int(cells.max()) + 1
    parts.append(torch.arange(position, position + len(ids) - at).expand(3, -1))
    return torch.cat(parts, dim=1), position + len(ids) - at
