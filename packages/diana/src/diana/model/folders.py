"""Which folder is meant: a checkpoint folder, the newest `checkpoint-N` in it, or a repository on the hub."""

import os
import re
from pathlib import Path

from tbps_common.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "tokenizer*",
    "special_tokens_map.json",
]


def resolve_folder(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The folder that holds `config.json`.

    Args:
        source: a folder, a folder with `checkpoint-N` folders (the highest complete N is taken), or `owner/name` on the
            Hugging Face hub, which is downloaded to its cache.
        weights: the folder must hold a weight file too.

    Raises:
        CheckpointError: there is no such folder, or nothing complete in it.
    """
    text = os.fspath(source)
    if "<" in text and ">" in text:
        raise CheckpointError(f"{text} still holds a placeholder: replace <...> by the real folder.")
    folder = Path(text)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights.")
    if not folder.is_dir():
        return _from_hub(text, weights)
    if _complete(folder, weights):
        return folder
    numbered = sorted(
        (int(match[1]), entry) for entry in folder.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))
    )
    for _, entry in reversed(numbered):
        if _complete(entry, weights):
            return entry
    if weights and (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds config.json but no weights ({WEIGHT_FILES[0]}); give a finished checkpoint."
        )
    raise CheckpointError(
        f"{folder} holds no DiaNA checkpoint (config.json with weights, or checkpoint-N folders); check the path."
    )


def _complete(folder: Path, weights: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    return not weights or any((folder / name).is_file() for name in WEIGHT_FILES)


def _from_hub(name: str, weights: bool) -> Path:
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"The folder {name} does not exist; check the path.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, gated, absent, no network: the hub client has an exception for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} is neither a folder nor could it be fetched from the Hugging Face hub ({reason}); check the path, or "
            "log in if the repository is gated."
        ) from error
    if not _complete(folder, weights):
        raise CheckpointError(f"The repository {name} holds no config.json with weights beside it; check the name.")
    return folder
