"""The training folder on disk: id files, and per id an image, a JSON file and a mask. No torch is needed to read it.

ROOT/img_ids_train.txt         one id per line
ROOT/00000/000000017.jpg       first five characters of the id, then the id
ROOT/00000/000000017.json      description and segments
ROOT/00000/000000017.npy       2-D integers of the image's size: 0 background, k = segment id
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tbps_common.errors import DatasetError

SPLIT_FILES = {"train": "_train", "test": "_test", "all": ""}
ID_FILE_STEMS = ("img_ids", "image_ids")  # the second is FastComposer's
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
LABEL_KEYS = ("label", "coco_label", "attribute_type")
CAPTION_KEYS = ("description", "caption")
_SHOWN = 5


class FolderLayout:
    """Names and JSON files of one split.

    Args:
        root: of the training folder.
        split: `train`, `test` or `all`.

    Attributes:
        ids: the split's ids, in the order of its file.
        id_file: that file.

    Raises:
        DatasetError: the folder or its id file cannot be used.
        ValueError: the split's name is unknown.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        if split not in SPLIT_FILES:
            raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(SPLIT_FILES)}")
        self.root, self.split = Path(root), split
        if not self.root.is_dir():
            raise DatasetError(f"--dataset_name {self.root} is not a folder: name the root of a training folder")
        names = [f"{stem}{SPLIT_FILES[split]}.txt" for stem in ID_FILE_STEMS]
        found = next((self.root / name for name in names if (self.root / name).is_file()), None)
        if found is None:
            raise DatasetError(
                f"{self.root} holds no {names[0]}: name the root of a training folder (segment.py makes one)"
            )
        self.id_file = found
        self.ids = _read_ids(found)
        self._listings: dict[Path, frozenset[str]] = {}

    def stem(self, img_id: str) -> Path:
        """Path of a sample's files without their suffix: in the folder `id[:5]`, or beside the id files."""
        chunked = self.root / img_id[:5] / img_id
        if f"{img_id}.json" in self._names_in(chunked.parent) or not self._has_files(self.root / img_id):
            return chunked
        return self.root / img_id

    def image_path(self, img_id: str) -> Path:
        """Path of a sample's image.

        Raises:
            DatasetError: there is none.
        """
        stem = self.stem(img_id)
        names = self._names_in(stem.parent)
        for suffix in IMAGE_SUFFIXES:
            if f"{img_id}{suffix}" in names:
                return stem.parent / f"{img_id}{suffix}"
        raise DatasetError(
            f"{stem}{IMAGE_SUFFIXES[0]} does not exist: copy the image, or take {img_id} out of {self.id_file}"
        )

    def missing_files(self) -> Iterator[Path]:
        """Files that the ids need and that are not there; one listing per folder."""
        for img_id in self.ids:
            stem = self.stem(img_id)
            names = self._names_in(stem.parent)
            if not any(f"{img_id}{suffix}" in names for suffix in IMAGE_SUFFIXES):
                yield stem.parent / f"{img_id}{IMAGE_SUFFIXES[0]}"
            for suffix in (".json", ".npy"):
                if f"{img_id}{suffix}" not in names:
                    yield stem.parent / f"{img_id}{suffix}"

    def read_info(self, img_id: str) -> dict[str, Any]:
        """The JSON of a sample, checked; its caption under `description`, each segment's type under `label` (or None).

        Raises:
            DatasetError: the file is damaged or lacks something; names the file and the key.
        """
        path = self.stem(img_id).parent / f"{img_id}.json"
        try:
            info = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist: copy it, or take {img_id} out of {self.id_file}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(f"{path} cannot be read as JSON ({error}): repair the file") from error
        return _checked(info, path)

    def _has_files(self, stem: Path) -> bool:
        return f"{stem.name}.json" in self._names_in(stem.parent)

    def _names_in(self, folder: Path) -> frozenset[str]:
        if folder not in self._listings:
            self._listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        return self._listings[folder]


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as text ({error}): write one id per line") from error
    ids = [line.strip() for line in lines if line.strip()]
    for number, img_id in enumerate(ids, start=1):
        if img_id != os.path.basename(img_id) or img_id in (".", "..") or "\\" in img_id or "\0" in img_id:
            raise DatasetError(f"{path}: entry {number}, {img_id!r}, is a path, not an id: write one id per line")
    if not ids:
        raise DatasetError(f"{path} is empty: write one id per line")
    return ids


def _checked(info: Any, path: Path) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise DatasetError(f"{path} holds a {type(info).__name__}, not an object with description and segments")
    caption = next((info[key] for key in CAPTION_KEYS if key in info), None)
    if not isinstance(caption, str):
        raise DatasetError(f"{path} has no text under {CAPTION_KEYS[0]!r}: add the caption")
    segments = info.get("segments")
    if not isinstance(segments, list):
        raise DatasetError(f"{path} has no list under 'segments': add it (it may be empty)")
    checked = [_checked_segment(segment, f"{path}, segment {number}") for number, segment in enumerate(segments)]
    return {**info, "description": caption, "segments": checked}


def _checked_segment(segment: Any, where: str) -> dict[str, Any]:
    if not isinstance(segment, Mapping):
        raise DatasetError(f"{where} is not an object with id, bbox and end")
    for key in ("id", "end"):
        if type(segment.get(key)) is not int:
            raise DatasetError(f"{where}: {key!r} must be a whole number, not {segment.get(key)!r}")
    if not 0 <= segment["id"] <= 255:
        raise DatasetError(f"{where}: 'id' must lie between 0 and 255, as the values of a mask do, not {segment['id']}")
    box = segment.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(type(side) is int for side in box)):
        raise DatasetError(f"{where}: 'bbox' must be four whole numbers [x1, y1, x2, y2], not {box!r}")
    if not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise DatasetError(f"{where}: 'bbox' {box} is empty or begins outside the image: [x1, y1, x2, y2], half open")
    if segment["end"] < 0:
        raise DatasetError(f"{where}: 'end' must not be negative, but is {segment['end']}")
    label = next((segment[key] for key in LABEL_KEYS if key in segment), None)
    if label is not None and not isinstance(label, str):
        raise DatasetError(f"{where}: {LABEL_KEYS[0]!r} must be text, not {label!r}")
    return {**segment, "label": label}


def require_files(layout: FolderLayout) -> None:
    """Check that every sample has its three files.

    Raises:
        DatasetError: files are missing; the first five are named.
    """
    missing = list(layout.missing_files())
    if missing:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise DatasetError(
            f"{len(missing)} files of the ids in {layout.id_file} are missing ({shown}): complete the folder, or take "
            "these ids out"
        )
