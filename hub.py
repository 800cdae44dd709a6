"""--model org/name: a checkpoint of the Hugging Face Hub, fetched into the Hub client's cache and read from there.

Nothing is ever fetched unless such a name is given, and a folder of that name goes before. What comes is data: weights
as safetensors, settings as JSON, text, templates (which transformers renders in a sandbox). No pickle, no code.

    org/name            the newest commit; without a network, the newest that is in the cache
    org/name@commit     that commit (or branch, or tag)

A run saves the name with its commit, so that a resumed one has the same weights under it (config.py).
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download  # comes with transformers, as its own way to the Hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from errors import InputError, cause_of

WEIGHTS, SETTINGS = ["*.safetensors"], ["*.json", "*.txt", "*.jinja"]
REASONS = {  # from the special to the general, as the client's errors inherit
    GatedRepoError: "its owners give access on request: ask on its page, then log in by `hf auth login`",
    RevisionNotFoundError: "it has no such commit, branch or tag",
    RepositoryNotFoundError: "the Hub has no such repository, or shows it only after `hf auth login`",
    LocalEntryNotFoundError: "the Hub cannot be reached from here, and the cache does not have it whole",
}


def is_name(model: str) -> bool:
    """Is it org/name or org/name@revision, and not a path? Where there is a folder out, out/step-000100 is one."""
    # A revision becomes a path under the cache: its parts begin as names do, and none is "..".
    named = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?", model, re.ASCII)
    return named is not None and ".." not in model and not Path(named[1]).exists()


def fetch(model: str, weights: bool = True) -> Path:
    """The folder of org/name[@revision] in the cache, after fetching what it lacks. Its name is the commit."""
    name, _, revision = model.partition("@")
    files = WEIGHTS + SETTINGS if weights else SETTINGS
    try:
        # */*: nothing from subfolders, where repositories keep other formats of the same weights
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises its own errors, its HTTP library's, ValueErrors and OSErrors
        why = next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), cause_of(error))
        raise InputError(
            f"--model {model}: no folder here, and cannot be had from the Hugging Face Hub ({why}); "
            "name a folder with the checkpoint"
        ) from error


def pinned(model: str, folder: Path) -> str:
    """What a run saves as its --model: a name of the Hub with the commit that was fetched, anything else as it is."""
    return f"{model.partition('@')[0]}@{folder.name}" if is_name(model) else model
