"""The samples of a training folder: which there are, writing one, and reading back which are complete."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dp_gen.segmentation.masks import tight_box
from tbps_common.datasets import Folder, iter_records
from tbps_common.errors import DatasetError
from tbps_common.files import atomic_path, write_text
from tbps_common.images import find_damage, read_image

# Images of these kinds are copied as they are; others become PNG.
_COPIED = {"JPEG": ".jpg", "PNG": ".png"}


@dataclass(frozen=True)
class Sample:
    """One caption of one image.

    Attributes:
        number: its place among all captions of the kept splits; nine digits of it are its id.
        name: the image's file name in the data set.
        path: the image file.
        split: as the annotations say.
        person: the person's id.
        caption_index: which of the image's captions.
        caption: its text.
    """

    number: int
    name: str
    path: str
    split: str
    person: int
    caption_index: int
    caption: str

    @property
    def id(self) -> str:
        return f"{self.number:09d}"

    def stem(self, root: Path) -> Path:
        """Path of its files, without their endings."""
        return root / self.id[:5] / self.id


def read_samples(annotations: str, image_root: str, splits: Sequence[str]) -> list[Sample]:
    """All captions of the kept splits, in file order; those without text are left out, but counted.

    Raises:
        DatasetError: the file or a record cannot be used, or a split is empty.
    """
    folder = Folder(image_root)
    samples: list[Sample] = []
    number = 0
    for record in iter_records(annotations):
        split = record.text("split") if "split" in record.fields else "train"
        if split not in splits:
            continue
        key = "file_path" if "file_path" in record.fields or "img_path" not in record.fields else "img_path"
        path = record.path(key, folder)
        person = record.integer("id")
        for index, caption in enumerate(record.texts("captions")):
            if caption.strip():
                samples.append(Sample(number, record.text(key), path, split, person, index, caption))
            number += 1
    if not samples:
        raise DatasetError(
            f"{annotations} has no captions in the splits {', '.join(splits)}: choose others with --splits"
        )
    return samples


def is_complete(sample: Sample, root: Path) -> bool:
    """Whether all files of a sample are there; its JSON file is written last."""
    return sample.stem(root).with_suffix(".json").is_file()


def segments_of(
    mask: np.ndarray, types: Sequence[str], caption: str, phrases: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Entries of a sample's JSON file: types that the image shows and the caption names, in fixed order."""
    segments = []
    for value, label in enumerate(types, start=1):
        box = tight_box(mask == value)
        if box is not None and label in phrases:
            start, end = phrases[label]
            segments.append(
                {"id": value, "label": label, "bbox": box, "start": start, "end": end, "phrase": caption[start:end]}
            )
    return segments


def write_sample(
    sample: Sample, root: Path, image: Image.Image, mask: np.ndarray, segments: list[dict[str, Any]]
) -> None:
    """Write image, mask and JSON file; each is whole or absent, and the JSON file comes last.

    Raises:
        OSError: a file cannot be written.
    """
    stem = sample.stem(root)
    kind = _format_of(sample.path)
    with atomic_path(stem.with_suffix(_COPIED.get(kind, ".png")), one_writer=True) as temporary:
        if kind in _COPIED:
            shutil.copyfile(sample.path, temporary)
        else:
            image.save(temporary, format="PNG")
    with atomic_path(stem.with_suffix(".npy"), one_writer=True) as temporary, open(temporary, "wb") as file:
        np.save(file, mask, allow_pickle=False)
    content = {
        "description": sample.caption,
        "width": image.width,
        "height": image.height,
        "segments": segments,
    }
    write_text(stem.with_suffix(".json"), json.dumps(content, ensure_ascii=False) + "\n", one_writer=True)


def read_segments(sample: Sample, root: Path) -> list[dict[str, Any]]:
    """Segments of a complete sample.

    Raises:
        DatasetError: its JSON file is damaged.
    """
    return _read_info(sample, root)["segments"]


def read_sample(sample: Sample, root: Path) -> tuple[dict[str, Any], np.ndarray]:
    """JSON object and mask of a complete sample.

    Raises:
        DatasetError: a file is damaged.
    """
    path = sample.stem(root).with_suffix(".npy")
    try:
        mask = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged headers make numpy fail with many kinds of exception
        raise DatasetError(f"{path} is damaged ({error}): delete the sample's .json file and run again") from error
    return _read_info(sample, root), mask


def _read_info(sample: Sample, root: Path) -> dict[str, Any]:
    path = sample.stem(root).with_suffix(".json")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info["segments"], list):
            raise TypeError("'segments' is no list")
        return info
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it and run again") from error


def read_whole_image(path: str) -> Image.Image:
    """RGB; unlike in training, where a cut-off file must not end a run, nothing is made from a part of an image.

    Raises:
        DatasetError: the image is damaged or cut off.
    """
    damage = find_damage(path)
    if damage is not None:
        raise DatasetError(f"the image {path} is damaged ({damage}): replace it, or take it out of --annotations")
    return read_image(path)


def _format_of(path: str) -> str:
    """What the file holds, whatever its name says: Pillow reads only the header here."""
    with Image.open(path) as image:
        return image.format or ""
