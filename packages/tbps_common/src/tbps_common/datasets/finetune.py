"""The processed fine-tuning files of MRA and APTM, one JSON list per data set and split: read, or made from raw data."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbps_common.datasets.json_records import Files, Folder, Identity, as_list, iter_records
from tbps_common.datasets.raw import DATASETS
from tbps_common.errors import InputError
from tbps_common.files import write_text

logger = logging.getLogger("tbps_common.datasets")

# Prefix of the files, and where MRA's configurations look for the images.
FINETUNE_PREFIX = {"CUHK-PEDES": "cuhk", "ICFG-PEDES": "icfg", "RSTPReid": "rstp"}
FINETUNE_IMAGES = {"CUHK-PEDES": "CUHK-PEDES/imgs", "ICFG-PEDES": "ICFG-PEDES", "RSTPReid": "RSTPReid"}
FINETUNE_SPLITS = {
    "CUHK-PEDES": ("train", "val", "test"),
    "ICFG-PEDES": ("train", "test"),  # has no validation split
    "RSTPReid": ("train", "val", "test"),
}


@dataclass(frozen=True, slots=True)
class ProcessedTrain:
    """Training pairs: entry i of the three lists is one image with one caption; labels are 0..n_labels-1."""

    image_paths: list[str]
    captions: list[str]
    labels: list[int]
    n_labels: int


@dataclass(frozen=True, slots=True)
class ProcessedEval:
    """Gallery images with their persons, and all captions in file order with theirs; ids as stored."""

    image_paths: list[str]
    captions: list[str]
    g_pids: list[int]
    q_pids: list[int]


def load_processed_train(
    files: Files | Mapping[str, Any] | Iterable[str | os.PathLike[str] | Mapping[str, Any]],
    image_root: str | os.PathLike[str],
) -> ProcessedTrain:
    """Read training files `{"image", "caption": str, "image_id"}`, one object per caption.

    Labels number the distinct `image_id` 0..n-1 in order of first appearance over all files. Captions are as stored.

    Args:
        files: one or several; each a path, or a mapping with the path as `file` and perhaps `image_root` (of this file's
            images) and `own_ids`. An id that stands in two files is one person (one data set in several files), with a
            warning; `own_ids: True` says that the ids of this file are of other people than those of any other file.
        image_root: of the files that name no other.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    image_paths, captions, labels = [], [], []
    label_of: dict[tuple[int, Identity], int] = {}
    file_of: dict[Identity, int] = {}
    entries = [files] if isinstance(files, str | os.PathLike | Mapping) else list(files)
    names = as_list([entry["file"] if isinstance(entry, Mapping) else entry for entry in entries])
    for number, (file, entry) in enumerate(zip(names, entries)):
        marks = entry if isinstance(entry, Mapping) else {}
        own_ids, folder = bool(marks.get("own_ids")), Folder(marks.get("image_root") or image_root)
        shared: dict[int, set[Identity]] = {}
        for record in iter_records(file, "caption"):
            if type(record.fields.get("caption")) is list:
                raise record.error("caption", "holds a list, as evaluation files do; a training file has one string")
            image_paths.append(record.path("image", folder))
            captions.append(record.text("caption"))
            identity = record.identity("image_id")
            labels.append(label_of.setdefault((number if own_ids else -1, identity), len(label_of)))
            if not own_ids and (first := file_of.setdefault(identity, number)) != number:
                shared.setdefault(first, set()).add(identity)
        for first, identities in shared.items():
            logger.warning(
                "%d image_id(s) of %s stand in %s too and count as the same people; if they are other people, write "
                "the entry as {file: %s, own_ids: True}",
                len(identities),
                file,
                names[first],
                file,
            )
    return ProcessedTrain(image_paths, captions, labels, len(label_of))


def load_processed_eval(file: str | os.PathLike[str], image_root: str | os.PathLike[str]) -> ProcessedEval:
    """Read one evaluation file `{"image", "caption": [str, ...], "image_id"}`, one object per image.

    Raises:
        DatasetError: the file or a record cannot be used.
    """
    folder = Folder(image_root)
    result = ProcessedEval([], [], [], [])
    for record in iter_records(file, "caption"):
        if type(record.fields.get("caption")) is str:
            raise record.error("caption", "holds a string, as training files do; an evaluation file has a list")
        captions, pid = record.texts("caption"), record.integer("image_id")
        result.image_paths.append(record.path("image", folder))
        result.captions.extend(captions)
        result.g_pids.append(pid)
        result.q_pids.extend([pid] * len(captions))
    return result


def convert_to_finetune(name: str, root: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[Path]:
    """Write the fine-tuning files of one data set.

    Training files hold one object per caption, evaluation files one per image with the list of captions; names and
    person ids are those of the raw file, in its order.

    Args:
        name: key of `DATASETS`.
        root: folder that holds the folder of the data set.
        out: folder of the files, made if absent.

    Returns:
        The files written.

    Raises:
        DatasetError: the raw data cannot be used.
        OSError: a file cannot be written; each file is whole or not there.
    """
    dataset = DATASETS[name](root, verbose=False)
    annotations = {"train": dataset.train_annos, "val": dataset.val_annos, "test": dataset.test_annos}
    if "val" not in FINETUNE_SPLITS[name] and dataset.val_annos:
        logger.warning(
            "%s: %d validation images are left out: %s has none as published", root, len(dataset.val_annos), name
        )
    written = []
    for split in FINETUNE_SPLITS[name]:
        path = Path(out, f"{FINETUNE_PREFIX[name]}_{split}.json")
        records = (
            {"image": record[dataset.path_key], "caption": caption, "image_id": int(record["id"])}
            for record in annotations[split]
            for caption in (record["captions"] if split == "train" else [record["captions"]])
        )
        write_text(path, one_record_per_line(records))
        written.append(path)
    return written


def link_images(name: str, root: str | os.PathLike[str], images: str | os.PathLike[str]) -> Path:
    """Make the image folder of a raw data set visible where MRA's configurations look for it.

    A symbolic link where the file system knows them, else a copy.

    Returns:
        The link or folder, `<images>/CUHK-PEDES/imgs`, `<images>/ICFG-PEDES` or `<images>/RSTPReid`.

    Raises:
        InputError: something else is at that place.
        OSError: the link or the copy cannot be made.
    """
    source = Path(root, name, "imgs").resolve()
    link = Path(images, FINETUNE_IMAGES[name])
    if link.exists() and link.resolve() == source:
        return link
    if link.is_symlink() or link.exists():
        raise InputError(f"{link} exists and is not {source}; remove it, or choose another folder for --link_images.")
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(source, target_is_directory=True)
    except (OSError, NotImplementedError):
        # Under another name until it is complete, so that a part is never taken for the whole.
        part = link.with_name(f".{link.name}.tmp{os.getpid()}")
        try:
            shutil.copytree(source, part)
            part.rename(link)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return link


def one_record_per_line(records: Iterable[dict[str, Any]]) -> str:
    """A JSON list that can be read by eye and compared line by line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    return f"[\n{lines}\n]\n" if lines else "[]\n"
