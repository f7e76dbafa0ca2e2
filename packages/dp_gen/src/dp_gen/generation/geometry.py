"""From an image to the model's square and back, and the regions that an edit may change."""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_gen.data.transforms import Transform4TestWithSegmap


def to_square(image: Tensor, mask: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The test transform with whole mask values: uint8 [3, h, w] and [h, w] -> float [3, R, R] in [-1, 1], uint8 [R, R]."""
    settings = argparse.Namespace(resolution=resolution, seg_map_interpolation="nearest")
    return Transform4TestWithSegmap(settings)(image, mask)


@dataclass(frozen=True)
class Square:
    """Where an image of `height` x `width` lies in the square of side `resolution` that the test transform makes of it.

    Tall images are whole, between black bars; of wide ones the middle is there.
    """

    height: int
    width: int
    resolution: int

    def back(self, square: Tensor) -> Tensor:
        """What the square shows, at the image's own size. [C, R, R] -> [C, h, w]

        Where the square shows nothing, its outermost columns are repeated: bars would darken the image's edges.
        """
        side = self.resolution
        if self.height > self.width:
            tall = int(side * self.height / self.width)
            bar = (tall - side) // 2
            first = min(math.ceil(bar * side / (side + 2 * bar)), (side - 1) // 2)
            inner = F.pad(square[None, ..., first : side - first], (first, first, 0, 0), mode="replicate")[0]
            unsqueezed = _resize(inner, tall, side + 2 * bar)[..., bar : bar + side]
            return _resize(unsqueezed, self.height, self.width)
        wide = int(side * self.width / self.height)
        start = (wide - side) // 2
        scaled = F.pad(square[None], (start, wide - side - start, 0, 0), mode="replicate")[0]
        return _resize(scaled, self.height, self.width)

    def visible(self) -> Tensor:
        """1 where the square shows the image, else 0: float [1, h, w]."""
        seen = torch.ones(1, self.height, self.width)
        hidden = max(0, self.width - self.height)
        if hidden:
            left = math.ceil(hidden / 2)
            seen[..., :left] = 0
            seen[..., left + self.height :] = 0
        return seen


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]


def dilate(region: Tensor, share: float) -> Tensor:
    """Grow a region by `share` of its side in all directions: float [R, R] of 0 and 1."""
    radius = round(share * region.shape[-1])
    if radius <= 0:
        return region
    return F.max_pool2d(region[None, None], 2 * radius + 1, stride=1, padding=radius)[0, 0]


def at_latent_size(region: Tensor) -> Tensor:
    """1 for every latent with a pixel of the region: [R, R] -> [1, R/8, R/8]."""
    return F.max_pool2d(region[None], 8)


def feather(region: Tensor, share: float) -> Tensor:
    """Soften a region's border inwards and outwards by `share` of its side, to a smooth ramp: float [R, R] in [0, 1]."""
    radius = max(1, math.ceil(share * region.shape[-1]))
    soft = region[None, None]
    for _ in range(2):  # two box filters make a ramp without corners
        soft = F.pad(soft, (radius,) * 4, mode="replicate")
        soft = F.avg_pool2d(soft, 2 * radius + 1, stride=1)
    return soft[0, 0]


def paste(original: Tensor, edited: Tensor, region: Tensor, square: Square) -> Tensor:
    """The edited square on the original image, at the original's size: pixels outside the region stay as they are.

    Args:
        original: uint8 [3, h, w].
        edited: float [3, R, R] in [0, 1].
        region: float [R, R] in [0, 1], softened at its border.
        square: how they fit.

    Returns:
        uint8 [3, h, w].
    """
    weight = square.back(region[None]).clamp(0, 1) * square.visible()
    picture = square.back(edited).clamp(0, 1) * 255
    mixed = weight * picture + (1 - weight) * original
    return torch.where(weight > 0.002, mixed.round(), original.float()).clamp(0, 255).to(torch.uint8)
