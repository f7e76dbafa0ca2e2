"""Where a model named on the command line is: a file, a folder in the layout of the hub, or a repository on the hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbps_common.errors import CheckpointError

HUB_PREFIX = "hf:"
HUB_CONFIG, HUB_WEIGHTS = "config.json", "model.safetensors"
# What a folder in this project's layout of the hub holds.
HUB_FILES = (HUB_CONFIG, HUB_WEIGHTS, "*.txt", "vocab.json", "tokenizer_config.json", "README.md")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(pth|pt|bin|ckpt|safetensors|ya?ml|json)$")


def find_model(source: str, flag: str) -> str:
    """A checkpoint file or hub folder as it is; a repository of the hub as the folder of its download.

    `hf:owner/name` is always a repository. `owner/name` is one unless it, or a folder `owner`, exists here, or it ends as weight
    files do. Nothing is downloaded for any other name.

    Args:
        source: as given.
        flag: for messages.

    Raises:
        CheckpointError: the repository cannot be fetched.
    """
    name = source.removeprefix(HUB_PREFIX)
    if name == source and (os.path.exists(source) or not _is_repository(source)):
        return source
    return str(fetch(name, HUB_FILES, f"{flag} {source}"))


def is_hub_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds `config.json` and `model.safetensors`."""
    return all((Path(path) / name).is_file() for name in (HUB_CONFIG, HUB_WEIGHTS))


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is what `tbps_common.run.checkpoint.load_checkpoint_file` may read: a file, or a folder of the hub."""
    return os.path.isfile(path) or is_hub_folder(path)


def results_folder(folder: Path) -> Path:
    """Where a model's results go if nothing else is named: its own folder, or `results/owner--name` for a download from the hub.

    What lies in the cache belongs to the hub's client, and what is added there is lost when the cache is cleaned.
    """
    repository = folder.resolve().parents[1].name if folder.resolve().parent.name == "snapshots" else ""
    return Path("results", repository.removeprefix("models--")) if repository.startswith("models--") else folder


def _is_repository(name: str) -> bool:
    owner = name.partition("/")[0]
    return bool(_REPOSITORY.fullmatch(name)) and not _FILE.search(name) and not os.path.isdir(owner)


def fetch(name: str, patterns: Sequence[str], named: str, **options: Any) -> Path:
    """The folder of a repository of the hub, downloaded unless it is in the cache.

    Args:
        name: `owner/name`.
        patterns: of the files wanted.
        named: how the message calls it.
        **options: of `huggingface_hub.snapshot_download` (`revision`, `cache_dir`, ...).

    Raises:
        CheckpointError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # takes half a second, and few commands fetch anything

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:  # offline, gated, absent, no network: the hub client has an exception for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{named} is neither a folder nor could it be fetched from the Hugging Face hub ({reason}); check the path, or "
            "log in if the repository is gated."
        ) from error
