"""Image transforms, PIL in and float `[3, H, W]` out, with the constants of the released code."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms

PADDING = 10
ERASED_AREA = (0.02, 0.4)

Transform = Callable[[Image.Image], Tensor]


class ToRGB:
    """Any mode to RGB."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")


def build_train_transform(image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize, flip, pad and crop, normalise, erase a rectangle.

    The erased rectangle is filled with the mean vector *after* normalisation (so it is not the mean colour), as in the
    released code.

    Args:
        image_size: height and width.
        mean: of the data set, per channel; the same for `std`.
        std: standard deviation per channel.
    """
    erased: Any = list(mean)  # torchvision's annotation knows numbers only
    return transforms.Compose(
        [
            ToRGB(),
            _resize(image_size),
            transforms.RandomHorizontalFlip(0.5),
            transforms.Pad(PADDING, fill=0),
            transforms.RandomCrop(tuple(image_size)),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            transforms.RandomErasing(scale=ERASED_AREA, value=erased),
        ]
    )


def build_eval_transform(image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize to height and width (the aspect ratio is not kept) and normalise."""
    return transforms.Compose([ToRGB(), _resize(image_size), transforms.ToTensor(), transforms.Normalize(mean, std)])


def _resize(image_size: Sequence[int]) -> transforms.Resize:
    return transforms.Resize(tuple(image_size), interpolation=transforms.InterpolationMode.BILINEAR)
