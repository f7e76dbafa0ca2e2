"""From pictures to tensors. Resizing is torchvision's classic one on uint8 tensors everywhere: float32, rounded back.

`transforms.v2` has a fixed-point kernel on some CPUs, which differs by one level in about a fifth of the pixels.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize


def _resize(image: Tensor, size: int | Sequence[int], *, nearest: bool = False) -> Tensor:
    mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
    sides = [size] if isinstance(size, int) else list(size)  # one side is the shorter one
    return resize(image, sides, interpolation=mode, antialias=not nearest)


class Transform4TestWithSegmap:
    """Image and mask to a square of the training's resolution.

    A tall picture is scaled to the shorter side, gets black bars left and right, and is squeezed to the square. As
    released, the mask goes through the second, bilinear resize too, which blends segment ids at borders;
    `args.seg_map_interpolation = "nearest"` keeps the ids. A wide picture loses its left and right ends.

    Args:
        args: `resolution` R, and `seg_map_interpolation`.
    """

    def __init__(self, args: argparse.Namespace):
        self.resolution = int(args.resolution)
        self.nearest = getattr(args, "seg_map_interpolation", "bilinear") == "nearest"

    def __call__(self, img: Tensor, seg_map: Tensor, flip: bool | None = None) -> tuple[Tensor, Tensor]:
        """Transform one sample.

        Args:
            img: uint8 [3, h, w].
            seg_map: integers 0 to 255, [h, w].
            flip: has no effect here.

        Returns:
            float [3, R, R] in [-1, 1], and uint8 [R, R].
        """
        return self._transform(img, seg_map, False)

    def _transform(self, img: Tensor, seg_map: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
        img = _resize(img, self.resolution)
        seg = _resize(seg_map.to(torch.uint8)[None], self.resolution, nearest=True)
        both = torch.cat([img, seg])  # (4, h, w)
        if flip:
            both = both.flip(-1)
        both = self._square(both)
        return both[:3].float() / 127.5 - 1, both[3]

    def _square(self, both: Tensor) -> Tensor:
        height, width = both.shape[1:]
        if height <= width:
            start = (width - height) // 2
            return both[:, :, start : start + height]
        bar = (height - width) // 2
        padded = torch.nn.functional.pad(both, (bar, bar))
        size = (width, width)
        if not self.nearest:
            return _resize(padded, size)
        return torch.cat([_resize(padded[:3], size), _resize(padded[3:], size, nearest=True)])


class Transform4TrainWithSegmap(Transform4TestWithSegmap):
    """As `Transform4TestWithSegmap`, mirrored with probability 0.5."""

    def __call__(self, img: Tensor, seg_map: Tensor, flip: bool | None = None) -> tuple[Tensor, Tensor]:
        """Transform one sample; `flip` None draws (one uniform number of torch's default generator)."""
        if flip is None:
            flip = bool(torch.rand(1) < 0.5)
        return self._transform(img, seg_map, flip)


def attribute_transforms(resolution: int) -> Callable[[Tensor], Tensor]:
    """A reference image, uint8 [3, h, w], to float [3, R, R] in [0, 1]; its aspect ratio is not kept, as released."""

    def transform(image: Tensor) -> Tensor:
        return _resize(image, (resolution, resolution)).float() / 255

    return transform


def cut_attribute(img: Tensor, background: Tensor, seg_map: Tensor, id: int, bbox: Sequence[int]) -> Tensor:
    """Cut a segment out of a picture, on another background.

    Args:
        img: uint8 [3, h, w]; not modified.
        background: uint8 [3, h, w].
        seg_map: [h, w].
        id: of the segment in it.
        bbox: x1, y1, x2, y2 in pixels, half open.

    Returns:
        uint8 [3, y2-y1, x2-x1].
    """
    left, top, right, bottom = bbox
    rows, columns = slice(top, bottom), slice(left, right)
    inside = seg_map[rows, columns] == id
    return torch.where(inside, img[:, rows, columns], background[:, rows, columns])
