"""Region boxes of pre-training: from an annotated box to a random crop that keeps it, and to the tokens it covers."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

PADDING = 10
"""Black pixels added on every side before the random crop."""


@dataclass(frozen=True)
class Box:
    """Left, top, width and height in pixels."""

    x: float
    y: float
    w: float
    h: float


def box_in_pixels(relative: tuple[float, float, float, float], width: int, height: int) -> Box | None:
    """A box given as centre and size relative to its picture, clipped to the picture; None if nothing is left."""
    centre_x, centre_y, w, h = relative
    box_w, box_h = int(w * width), int(h * height)
    x, y = max(int(centre_x * width) - box_w / 2, 0), max(int(centre_y * height) - box_h / 2, 0)
    box = Box(x, y, min(box_w, width - x), min(box_h, height - y))
    return box if box.w > 0 and box.h > 0 else None


def crop_around(image: Image.Image, box: Box, size: tuple[int, int], rng: Any = random) -> tuple[Image.Image, Box]:
    """Pad, crop at random without cutting the box, flip at random, resize.

    Args:
        image: RGB picture.
        box: in its pixels.
        size: height and width of the result.
        rng: generator of the four borders and the flip, in this order: left, top, right, bottom, flip.

    Returns:
        The picture, and the box in its pixels.
    """
    image = ImageOps.expand(image, PADDING, fill=0)
    x, y = box.x + PADDING, box.y + PADDING
    left, top = rng.randint(0, math.floor(x)), rng.randint(0, math.floor(y))
    right = rng.randint(min(math.ceil(x + box.w), image.width), image.width)
    bottom = rng.randint(min(math.ceil(y + box.h), image.height), image.height)
    image = image.crop((left, top, right, bottom))
    x, y = x - left, y - top
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = image.width - x - box.w
    height, width = size
    scale_x, scale_y = width / image.width, height / image.height
    return (
        image.resize((width, height), Image.Resampling.BICUBIC),
        Box(x * scale_x, y * scale_y, box.w * scale_x, box.h * scale_y),
    )


def region_attention(x: float, y: float, w: float, h: float, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    """Which tokens of an image lie outside a box.

    Args:
        x: left border in pixels of the resized image.
        y: top border.
        w: width.
        h: height.
        patch_size: pixels per token.
        grid_h: rows of tokens.
        grid_w: columns of tokens.

    Returns:
        int64 `[1 + grid_h * grid_w]`: 0 for tokens the box touches (at least one), 1 for the others and for the image's
        own token, which comes first.
    """
    rows, columns = _covered(y, h, patch_size, grid_h), _covered(x, w, patch_size, grid_w)
    outside = torch.ones(grid_h, grid_w, dtype=torch.int64)
    outside[rows.start : rows.stop, columns.start : columns.stop] = 0
    return torch.cat([torch.ones(1, dtype=torch.int64), outside.flatten()])


def _covered(start: float, length: float, patch_size: int, count: int) -> range:
    first = min(math.floor(start / patch_size), count - 1)
    return range(first, max(first + 1, min(math.ceil((start + length) / patch_size), count)))
