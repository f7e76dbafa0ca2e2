"""Image transforms: PIL picture in, normalised float tensor `[3, d, d]` out.

`--transform squarepad` pads the picture to a square before it is resized, so that a person keeps its proportions;
`targetpad` pads only as far as a given aspect ratio; `resize` stretches. All resizing is bicubic on the PIL picture
(antialiased, 8-bit result). Random draws come from torch's global generator: flip, then crop (top, left).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tbps_common.errors import InputError

Transform = Callable[[Image.Image], Tensor]

# Of the pictures CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PERSON_SIZE = (384, 192)
"""Height and width of SynCPR's pictures."""
CROP_PADDING = 10
RESIZE_MARGIN = 10


class SquarePad:
    """Pad with black to a square, equally on both sides; an odd difference leaves the result one pixel short."""

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = max(width, height)
        return _padded(image, (side - width) // 2, (side - height) // 2)


class TargetPad:
    """Pad the shorter side with black until the sides have the ratio `target_ratio`, if they differ by more than that.

    Args:
        target_ratio: longer by shorter side of the result; above 0.
    """

    def __init__(self, target_ratio: float):
        self.target_ratio = target_ratio

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if max(width, height) / min(width, height) < self.target_ratio:
            return image
        side = max(width, height) / self.target_ratio
        # int() truncates towards zero, unlike //, before the maximum is taken.
        horizontal, vertical = (max(int((side - length) / 2), 0) for length in (width, height))
        return _padded(image, horizontal, vertical)


class RandomCrop:
    """Cut `size` (height, width) out at random; a picture that is too small is refused, never padded."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.width < width or image.height < height:
            raise ValueError(
                f"a crop of {height} x {width} pixels (height x width) does not fit into a picture of "
                f"{image.height} x {image.width} (padding included): resize the picture first, or use another --transform"
            )
        if image.size == (width, height):  # nothing to choose, and nothing is drawn
            return image
        top = int(torch.randint(0, image.height - height + 1, (1,)))
        left = int(torch.randint(0, image.width - width + 1, (1,)))
        return image.crop((left, top, left + width, top + height))


def _padded(image: Image.Image, horizontal: int, vertical: int) -> Image.Image:
    return ImageOps.expand(image, (horizontal, vertical, horizontal, vertical))


class _ToRGB:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == "RGB" else image.convert("RGB")


def _pipeline(*steps: Callable) -> Transform:
    normalised = (v2.ToImage(), v2.ToPureTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
    return v2.Compose([_ToRGB(), *steps, *normalised])


def _resize(size: int | tuple[int, int]) -> v2.Resize:
    sides = [size] if isinstance(size, int) else list(size)
    return v2.Resize(sides, InterpolationMode.BICUBIC, antialias=True)


def _fit(d: int) -> tuple[Callable, Callable]:
    """Shorter side to `d`, then the middle `d` x `d`."""
    return _resize(d), v2.CenterCrop(d)


def squarepad_transform(d: int) -> Transform:
    """Square pad, resize, centre crop."""
    return _pipeline(SquarePad(), *_fit(d))


def squarepad_transform_test(d: int, need_size: tuple[int, int] = PERSON_SIZE) -> Transform:
    """As `squarepad_transform`, after stretching to the height and width of SynCPR's pictures."""
    return _pipeline(_resize(need_size), SquarePad(), *_fit(d))


def squarepad_transform_train(d: int, need_size: tuple[int, int] = PERSON_SIZE) -> Transform:
    """Mirror at random, pad by 10 pixels and crop at random to `need_size` (height, width), square pad, resize.

    Nothing is resized before the crop: pictures are expected to have `need_size` already. The transform raises
    ValueError for one that is smaller than the crop after padding, and cuts a part out of a larger one.
    """
    return _pipeline(v2.RandomHorizontalFlip(0.5), v2.Pad(CROP_PADDING), RandomCrop(need_size), SquarePad(), *_fit(d))


def targetpad_transform(target_ratio: float, d: int) -> Transform:
    """Pad to an aspect ratio, resize, centre crop."""
    return _pipeline(TargetPad(target_ratio), *_fit(d))


def train_transform(d: int) -> Transform:
    """Stretch to a little more than `d` x `d`, crop and mirror at random (`--transform resize`)."""
    side = d + RESIZE_MARGIN
    return _pipeline(_resize((side, side)), RandomCrop((d, d)), v2.RandomHorizontalFlip(0.5))


def inference_transform(d: int) -> Transform:
    """Stretch to `d` x `d`."""
    return _pipeline(_resize((d, d)))


def blip_image_train(d: int) -> Transform:
    """LAVIS's training transform without its RandAugment; FAFA uses neither, `load_model_and_preprocess` returns it."""
    crop = v2.RandomResizedCrop([d, d], scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return _pipeline(crop, v2.RandomHorizontalFlip(0.5))


@dataclass(frozen=True)
class TransformPair:
    """What `--transform` stands for: one transform for training pictures, one for all others."""

    train: Transform
    test: Transform
    sentence: str


def build_transforms(name: str, d: int, target_ratio: float = 1.25) -> TransformPair:
    """The transforms of a run.

    Args:
        name: `squarepad`, `targetpad` or `resize`.
        d: side of the model's input in pixels.
        target_ratio: of targetpad.

    Raises:
        InputError: another name.
    """
    if name == "squarepad":
        sentence = "Square pad preprocess pipeline is used"
        return TransformPair(squarepad_transform_train(d), squarepad_transform_test(d), sentence)
    if name == "targetpad":
        pad = targetpad_transform(target_ratio, d)
        return TransformPair(pad, pad, f"Target pad with target_ratio = {target_ratio} preprocess pipeline is used")
    if name == "resize":
        return TransformPair(train_transform(d), inference_transform(d), "Resize preprocess pipeline is used")
    raise InputError(f"--transform {name} is unknown: choose squarepad, targetpad or resize")
