"""Reference images for generation: one per image token, in the order of their names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_gen.data.transforms import attribute_transforms
from tbps_common.errors import DatasetError
from tbps_common.images import read_image

REFERENCE_SUFFIXES = (".jpg", ".png", ".jpeg")


def read_references(folder: str | os.PathLike[str], resolution: int) -> tuple[Tensor, list[str]]:
    """Read a folder of references: a subfolder per reference (its first image counts), or image files.

    Args:
        folder: as given with `--test_reference_attribute_folder`.
        resolution: R.

    Returns:
        float [n, 3, R, R] in [0, 1], and the files; names are sorted as people do (2 before 10).

    Raises:
        DatasetError: there are no references, or one cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"--test_reference_attribute_folder {root} is not a folder: name the folder of references")
    subfolders = natural_sort(path for path in root.iterdir() if path.is_dir())
    files = [_first_image(path) for path in subfolders] if subfolders else natural_sort(_images_in(root))
    if not files:
        raise DatasetError(
            f"{root} holds no reference images ({', '.join(REFERENCE_SUFFIXES)}): add one per image token"
        )
    transform = attribute_transforms(resolution)
    pictures = [torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1) for file in files]
    return torch.stack([transform(picture) for picture in pictures]), [str(file) for file in files]


def natural_sort(paths: Iterable[Path]) -> list[Path]:
    """Sorted by name, runs of digits by their value."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.findall(r"\d+|\D+", path.name)
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(paths, key=key)


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in REFERENCE_SUFFIXES and path.is_file()]


def _first_image(folder: Path) -> Path:
    images = sorted(_images_in(folder))
    if not images:
        raise DatasetError(f"{folder} holds no image ({', '.join(REFERENCE_SUFFIXES)}): add the reference image")
    return images[0]
