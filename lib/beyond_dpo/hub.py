"""Models on the Hugging Face hub, which is asked only where somebody names one of them."""

import re
from pathlib import Path
from typing import NamedTuple

from beyond_dpo import events

# What a model is read from. No pickle is among them.
FILES = [
    "model*.safetensors",
    "*.json",
    "*.txt",
    "tokenizer.model",
    "*.jinja",
    "*.py",
]
ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # org/name@revision


class Model(NamedTuple):
    """Where a model lies on this machine, and what others may call it."""

    folder: Path
    name: str  # org/name@commit, or the folder's name without the way to it


def fetch(repo: str, revision: str | None = None) -> Path:
    """Return the folder in the hub's cache of a model on the hub, downloaded if missing.

    Raises the errors of the hub's client, which are many.
    """
    import huggingface_hub

    with events.slow(f"fetching {repo} from the hub"):
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=FILES)
    return Path(folder)


def first_line(error: Exception) -> str:
    """Return what an error of the hub's client says first; advice of many lines may follow."""
    text, _, _ = str(error).partition("\n")
    return text


def locate(model: str) -> Model:
    """Return a model that is named by its folder or by its hub id, org/name@revision.

    A folder of that name comes first. Raises ValueError, in one line, where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return Model(folder, folder.resolve().name)
    match = ID.fullmatch(model)
    if match is None or model.startswith(("./", "../")):
        raise ValueError(f"no such folder: {model}")
    repo, revision = match.groups()
    try:
        folder = fetch(repo, revision)
    except Exception as error:  # the hub's client has many, none of which says what to do
        raise ValueError(
            f"{model} is no folder here, and cannot be had from the hub ({first_line(error)}); "
            "give a folder, or log in with `hf auth login` if the model is gated"
        ) from error
    return Model(folder, f"{repo}@{folder.name}")  # a snapshot is named after its commit
