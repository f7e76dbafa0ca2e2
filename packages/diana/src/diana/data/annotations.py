"""The YAML file that names the data sets, and the annotation files it names."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tbps_common.datasets import ChatPedesImage, read_chatpedes
from tbps_common.datasets.json_records import as_list
from tbps_common.errors import DatasetError, InputError

logger = logging.getLogger("diana.data")

TRAIN_DATASETS = ("mals", "chatpedes")
ROOT_VARIABLE = "DIANA_DATA_ROOT"
PLACEHOLDER = "<Dataset Root>"

# The README names the image folder imgs00, the released configuration imgs.
_IMAGE_FOLDERS = ("imgs", "imgs00")


def load_dataset_config(path: str | os.PathLike[str], dataset: str) -> dict[str, Any]:
    """One data set's entry of `dataset_config.yaml`: `mean`, `std`, `image_root`, `<split>_annotation`.

    The environment variable DIANA_DATA_ROOT takes the place of `<Dataset Root>` in every value.

    Raises:
        InputError: the file is missing, is not YAML, does not list the data set, or still has the placeholder.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"--dataset_config_path {path} cannot be read ({error.strerror}); check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML ({reason}); correct it.") from error
    if not isinstance(content, dict) or not isinstance(content.get(dataset), dict):
        names = ", ".join(str(name) for name in content) if isinstance(content, dict) else "nothing"
        raise InputError(f"{path} has no entry {dataset!r} (it has {names}); choose one of these, or add it.")
    meta = _with_root(content[dataset], f"{path}, {dataset}")
    for name in ("mean", "std"):
        _check_channel_values(meta.get(name), f"{path}, {dataset}: {name}")
    if not isinstance(meta.get("image_root"), str):
        raise InputError(f"{path}, {dataset}: image_root must be a folder, not {meta.get('image_root')!r}.")
    return meta


def _with_root(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_root(entry, f"{where}: {key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_root(entry, where) for entry in value]
    if isinstance(value, str) and PLACEHOLDER in value:
        root = os.environ.get(ROOT_VARIABLE, "").strip()
        if not root:
            raise InputError(
                f"{where} still holds {PLACEHOLDER}: set the environment variable {ROOT_VARIABLE} to the folder that "
                "holds ChatPedes and MALS, or edit the file."
            )
        return value.replace(PLACEHOLDER, root)
    return value


def _check_channel_values(values: Any, where: str) -> None:
    numbers = isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    if not numbers or len(values) != 3:
        raise InputError(f"{where} must be three numbers (red, green, blue), not {values!r}.")


def image_folder(meta: Mapping[str, Any]) -> str:
    """`image_root`, or its sibling `imgs00`/`imgs` if only that exists (said in one warning)."""
    root = os.fspath(meta["image_root"])
    parent, name = os.path.split(os.path.normpath(root))
    if name in _IMAGE_FOLDERS and not os.path.isdir(root):
        for other in _IMAGE_FOLDERS:
            sibling = os.path.join(parent, other)
            if os.path.isdir(sibling):
                logger.warning("%s does not exist: images are read from %s", root, sibling)
                return sibling
    return root


def annotation_files(meta: Mapping[str, Any], split: str) -> list[str]:
    """The files of a split.

    Raises:
        DatasetError: the configuration names none.
    """
    files = meta.get(f"{split}_annotation")
    if not isinstance(files, (str, os.PathLike)) and not (
        isinstance(files, (list, tuple)) and files and all(isinstance(file, (str, os.PathLike)) for file in files)
    ):
        raise DatasetError(f"The data-set configuration has no {split}_annotation (one file or a list): check --split.")
    return as_list(files)


def read_dialogues(files: list[str], image_root: str) -> Iterator[tuple[ChatPedesImage, int]]:
    """The images of ChatPedes files in order, each with its label: distinct ids are numbered as they appear.

    Raises:
        DatasetError: a file or record cannot be used; it is named.
    """
    label_of: dict[int | str, int] = {}
    for image in read_chatpedes(files, image_root, pairs_only=False):
        yield image, label_of.setdefault(image.identity, len(label_of))


def load_annotations(meta: Mapping[str, Any], split: str) -> dict[str, list[Any]]:
    """ChatPedes as evaluation sees it: a gallery with one entry per record, and one query per dialogue.

    Args:
        meta: `image_root` and `<split>_annotation` (a file or a list of files).
        split: `test`, or `train` for the same view of the training file.

    Returns:
        `images` (paths) and `image_ids` (labels) of the gallery; `chats` (lists of rounds) and `caption_ids` (labels)
        of the queries. A record without dialogue stays in the gallery; one warning counts them.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    view: dict[str, list[Any]] = {"images": [], "image_ids": [], "chats": [], "caption_ids": []}
    without = 0
    for image, label in read_dialogues(annotation_files(meta, split), image_folder(meta)):
        view["images"].append(image.image_path)
        view["image_ids"].append(label)
        chats = [chat for chat in image.dialogues if any(chat)]
        view["chats"].extend(chats)
        view["caption_ids"].extend([label] * len(chats))
        without += not chats
    if without:
        logger.warning("%d records without a dialogue stay in the gallery, but give no query", without)
    if not view["images"]:
        raise DatasetError(f"The {split} annotation holds no record: get the file again.")
    return view
