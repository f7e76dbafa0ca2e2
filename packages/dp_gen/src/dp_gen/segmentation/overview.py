"""What segmentation found, to be looked at: some images with their regions, boxes and the phrases that name them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from dp_gen.segmentation.samples import Sample, read_sample
from tbps_common.images import read_image
from tbps_common.report import Picture, PictureRow, picture_grid, spread
from tbps_common.report.pictures import Words

_LINES = 12
_COLOURS = ("crimson", "royalblue", "seagreen", "darkorange", "purple", "teal", "saddlebrown", "deeppink", "olive")


def write_overview(path: Path, samples: Sequence[Sample], root: Path, types: Sequence[str]) -> None:
    """Draw some samples, evenly spread over those given.

    Args:
        path: PNG file.
        samples: complete ones, with segments.
        root: the training folder.
        types: attribute types, in the order of their values in the masks.

    Raises:
        DatasetError: a file of a sample is damaged.
        OSError: the file cannot be written.
    """
    colours = {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(types)}
    rows = []
    for place in spread(range(len(samples)), _LINES):
        sample = samples[place]
        info, mask = read_sample(sample, root)
        image = read_image(sample.path)
        segments = sorted(info["segments"], key=lambda segment: segment["end"])
        pictures = [Picture(image, sample.id), Picture(_overlay(image, mask, types, colours), "regions")]
        for segment in segments:
            left, top, right, bottom = segment["bbox"]
            pictures.append(Picture(image.crop((left, top, right, bottom)), segment["label"]))
        rows.append(PictureRow(pictures, list(_coloured(info["description"], segments, colours))))
    picture_grid(path, rows)


def _overlay(image: Image.Image, mask: np.ndarray, types: Sequence[str], colours: Mapping[str, str]) -> Image.Image:
    """The image with every region tinted, and its tight box."""
    tint = np.array(image, dtype=np.float32)
    boxes = []
    for value, label in enumerate(types, start=1):
        rows, columns = np.nonzero(mask == value)
        if len(rows):
            tint[rows, columns] = 0.4 * tint[rows, columns] + 0.6 * np.array(ImageColor.getrgb(colours[label]))
            boxes.append((label, (columns.min(), rows.min(), columns.max(), rows.max())))
    picture = Image.fromarray(tint.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for label, box in boxes:
        pen.rectangle([int(side) for side in box], outline=colours[label])
    return picture


def _coloured(caption: str, segments: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Iterator[Words]:
    """The caption in pieces, phrases in the colour of their region."""
    position = 0
    for segment in segments:
        start = max(position, segment["start"])
        yield caption[position:start], "black"
        yield caption[start : segment["end"]], colours[segment["label"]]
        position = max(position, segment["end"])
    yield caption[position:], "black"
