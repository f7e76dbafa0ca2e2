"""Which folder is meant: a checkpoint folder, the newest `checkpoint-N` in it, or a repository on the hub."""

import json
import logging
import os
import re
from pathlib import Path

from tbps_common.errors import CheckpointError
from tbps_common.models.source import fetch

logger = logging.getLogger("diana.model")

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
        source: a folder, a folder with `checkpoint-N` folders (the highest complete N is taken; damaged weights are passed
            over with a warning, if others are there), or `owner/name` on the
            Hugging Face hub, which is downloaded to its cache.
        weights: the folder must hold a weight file too.

    Raises:
        CheckpointError: there is no such folder, or nothing complete in it.
    """
    text = os.fspath(source)
    if "<" in text and ">" in text:
        raise CheckpointError(f"{text} still holds a placeholder: replace <...> with the real folder.")
    folder = Path(text)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights.")
    if not folder.is_dir():
        return _from_hub(text, weights)
    numbered = sorted(
        (int(match[1]), entry) for entry in folder.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))
    )
    complete = [entry for entry in (folder, *(entry for _, entry in reversed(numbered))) if _complete(entry, weights)]
    for place, entry in enumerate(complete):
        if not weights or has_sound_weights(entry):
            if place:
                logger.warning("the weights in %s are damaged: %s is used instead", complete[0], entry)
            return entry
    if complete:
        return complete[0]  # reading it says what is wrong
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds only a LoRA adapter, which changes another model; give the folder of the whole model."
        )
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


def has_sound_weights(folder: Path) -> bool:
    """Whether the weight file of a folder, or every shard of it, is as long as it should be; contents are not read."""
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".json"):
            return _is_whole(folder / name)
        try:
            shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            return all(_is_whole(folder / shard) for shard in shards)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return False
    return False


def _is_whole(file: Path) -> bool:
    size = file.stat().st_size if file.is_file() else 0
    if file.suffix != ".safetensors":
        return size > 0
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length <= size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(ends) and size == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def _from_hub(name: str, weights: bool) -> Path:
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"The folder {name} does not exist; check the path.")
    folder = fetch(name, _HUB_FILES, name)
    if not _complete(folder, weights):
        raise CheckpointError(f"The repository {name} holds no config.json with weights next to it; check the name.")
    return folder
