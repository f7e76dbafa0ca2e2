"""Reference images with their phrases, and the captions that they are written into."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_gen.data.references import REFERENCE_SUFFIXES, natural_sort
from dp_gen.data.transforms import attribute_transforms
from tbps_common.datasets import Folder
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import find_damage, read_image
from tbps_common.pipeline.journal import read_json_lines

POOL_LIST = "references.jsonl"
_UNCOUNTED = ("hair", "bangs", "footwear", "denim")


@dataclass(frozen=True)
class Reference:
    """An image of one attribute.

    Attributes:
        file: the image.
        label: attribute type.
        phrase: what it shows, in words.
    """

    file: Path
    label: str
    phrase: str


def read_pool(folder: str) -> dict[str, list[Reference]]:
    """References by label: from `references.jsonl` if the folder has one, else from its subfolders.

    A subfolder is named as its label (`uppercloth`), an image in it as its phrase (`red_coat.jpg`, `red_coat_2.jpg`).
    A line of `references.jsonl` is `{"file": ..., "label": ..., "phrase": ...}`.

    Raises:
        DatasetError: there are none, or a line or image cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"--reference_pool {root} is not a folder: name the folder of reference images")
    listed = root / POOL_LIST
    found = _from_list(listed) if listed.is_file() else _from_subfolders(root)
    if not found:
        raise DatasetError(
            f"--reference_pool {root} holds no references: put images into subfolders named as attribute types "
            f"(uppercloth/red_coat.jpg), or list them in {POOL_LIST}"
        )
    missing = [reference.file for reference in found if not reference.file.is_file()]
    if missing:
        raise DatasetError(f"{listed} names {len(missing)} files that do not exist ({missing[0]}, ...): add them")
    pool: dict[str, list[Reference]] = {}
    for reference in found:
        pool.setdefault(reference.label, []).append(reference)
    return pool


def _from_list(path: Path) -> list[Reference]:
    folder = Folder(path.parent)
    found = []
    for number, row in read_json_lines(path):
        where = f"{path}:{number + 1}"
        if isinstance(row, str):
            raise DatasetError(f"{where}: {row}")
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("file", "label", "phrase")):
            raise DatasetError(f'{where}: expected {{"file": ..., "label": ..., "phrase": ...}}, all text')
        problem = folder.problem(row["file"])
        if problem is not None:
            raise DatasetError(f"{where}: the file {row['file']!r} {problem}")
        found.append(Reference(Path(folder.join(row["file"])), row["label"], row["phrase"].strip()))
    return found


def _from_subfolders(root: Path) -> list[Reference]:
    return [
        Reference(file, subfolder.name, _phrase_of(file))
        for subfolder in natural_sort(path for path in root.iterdir() if path.is_dir())
        for file in natural_sort(path for path in subfolder.iterdir() if path.suffix.lower() in REFERENCE_SUFFIXES)
    ]


def _phrase_of(file: Path) -> str:
    """`red_coat_2.jpg` -> `red coat`."""
    phrase = re.sub(r"[_\s]+", " ", re.sub(r"[_\s]*\d+$", "", file.stem)).strip()
    if not phrase:
        raise DatasetError(f"the reference {file} has no words in its name: name it after what it shows (red_coat.jpg)")
    return phrase


def reference_tensor(file: Path, resolution: int) -> Tensor:
    """float [3, R, R] in [0, 1].

    Raises:
        DatasetError: the image cannot be read.
    """
    damage = find_damage(file)
    if damage is not None:
        raise DatasetError(f"the reference {file} is damaged ({damage}): replace it")
    picture = torch.from_numpy(np.array(read_image(file, as_shown=True))).permute(2, 0, 1)
    return attribute_transforms(resolution)(picture)


def rewrite(
    caption: str, segments: Sequence[Mapping[str, Any]], phrases: Mapping[str, str]
) -> tuple[str, list[dict[str, Any]]]:
    """Put new phrases in the place of old ones.

    Args:
        caption: original.
        segments: with `label`, `start` and `end`, not overlapping.
        phrases: new phrase of each edited label.

    Returns:
        The caption, and the segments with their places in it.

    Raises:
        InputError: an edited segment has no usable `start`.
    """
    text, position, moved = "", 0, []
    for segment in sorted(segments, key=lambda segment: segment["end"]):
        start, end = segment.get("start"), segment["end"]
        if segment["label"] not in phrases:
            text += caption[position:end]
        else:
            if not isinstance(start, int) or not position <= start < end:
                raise InputError(
                    f"the segment {segment['label']!r} of {caption!r} does not say where its phrase starts: use "
                    "--edit_caption original, or make the folder with segment.py"
                )
            text += caption[position:start] + _as_noun_phrase(phrases[segment["label"]], first=start == 0)
        position = end
        moved.append({**segment, "end": len(text)})
    return text + caption[position:], moved


def _as_noun_phrase(phrase: str, *, first: bool) -> str:
    """With an article where one is needed: `red coat` -> `a red coat`."""
    words = phrase.split()
    last = words[-1].lower()
    plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if words[0].lower() not in ("a", "an", "the", "his", "her", "their") and not plural and last not in _UNCOUNTED:
        phrase = f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"
    return phrase[0].upper() + phrase[1:] if first else phrase
