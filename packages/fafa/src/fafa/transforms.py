"""Image transforms: PIL picture in, normalised float tensor `[3, d, d]` out, or the pixels before they are normalised.

`--transform squarepad` pads the picture to a square before it is resized, so that a person keeps its proportions;
`targetpad` pads only as far as a given aspect ratio; `resize` stretches. All resizing is bicubic on the PIL picture
(antialiased, 8-bit result). Random draws come from torch's global generator: flip, then crop (top, left).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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
    """Cut `size` (height, width) out at random; a picture that is too small is refused, never padded.

    Args:
        size: height and width of the crop.
        padding: pixels of black around the picture, of which the crop may take some.
        square: pad the crop with black to a square, as `SquarePad` does. One paste does all three.
    """

    def __init__(self, size: tuple[int, int], padding: int = 0, square: bool = False):
        self.size, self.padding, self.square = size, padding, square

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        rows, columns = image.height + 2 * self.padding, image.width + 2 * self.padding
        if columns < width or rows < height:
            raise ValueError(
                f"a crop of {height} x {width} pixels (height x width) does not fit into a picture of "
                f"{rows} x {columns} (padding included): resize the picture first, or use another --transform"
            )
        top = left = -self.padding
        if (rows, columns) != (height, width):  # else there is nothing to choose, and nothing is drawn
            top += int(torch.randint(0, rows - height + 1, (1,)))
            left += int(torch.randint(0, columns - width + 1, (1,)))
        side = max(width, height) if self.square else 0
        across, down = max(side - width, 0) // 2, max(side - height, 0) // 2
        box = (max(left, 0), max(top, 0), min(left + width, image.width), min(top + height, image.height))
        kept = image if box == (0, 0, *image.size) else image.crop(box)
        whole = width + 2 * across, height + 2 * down
        if kept.size == whole:
            return kept
        canvas = Image.new(image.mode, whole)
        canvas.paste(kept, (across + max(-left, 0), down + max(-top, 0)))
        return canvas


def _padded(image: Image.Image, horizontal: int, vertical: int) -> Image.Image:
    return ImageOps.expand(image, (horizontal, vertical, horizontal, vertical))


class Pipeline:
    """Picture to tensor: the steps on the PIL picture, then scaling and normalising.

    Args:
        *steps: PIL picture to PIL picture.
    """

    def __init__(self, *steps: Callable[[Image.Image], Image.Image]):
        self.steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised, float32 `[3, d, d]`."""
        return normalised(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """Before it is normalised: uint8 `[3, d, d]`, a quarter of the bytes, which a model normalises on its device."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """`pixels / 255`, less CLIP's mean, by its deviation: uint8 `[..., 3, d, d]` to float32, on the device of `pixels`.

    The same to the bit as torchvision's ToTensor and Normalize on every device: divided is by tensors, because a GPU would
    multiply by the inverse of a number.
    """
    constants = torch.tensor([(255.0,) * 3, MEAN, STD])[..., None, None]
    scale, mean, deviation = constants.to(pixels.device, non_blocking=True)
    return pixels.to(torch.float32).div_(scale).sub_(mean).div_(deviation)


def _resize(size: int | tuple[int, int]) -> v2.Resize:
    sides = [size] if isinstance(size, int) else list(size)
    return v2.Resize(sides, InterpolationMode.BICUBIC, antialias=True)


def _fit(d: int) -> tuple[Callable, Callable]:
    """Shorter side to `d`, then the middle `d` x `d`."""
    return _resize(d), v2.CenterCrop(d)


def squarepad_transform(d: int) -> Pipeline:
    """Square pad, resize, centre crop."""
    return Pipeline(SquarePad(), *_fit(d))


def squarepad_transform_test(d: int, need_size: tuple[int, int] = PERSON_SIZE) -> Pipeline:
    """As `squarepad_transform`, after stretching to the height and width of SynCPR's pictures."""
    return Pipeline(_resize(need_size), SquarePad(), *_fit(d))


def squarepad_transform_train(d: int, need_size: tuple[int, int] = PERSON_SIZE) -> Pipeline:
    """Mirror at random, pad by 10 pixels and crop at random to `need_size` (height, width), square pad, resize.

    Nothing is resized before the crop: pictures are expected to have `need_size` already. The transform raises
    ValueError for one that is smaller than the crop after padding, and cuts a part out of a larger one.
    """
    return Pipeline(v2.RandomHorizontalFlip(0.5), RandomCrop(need_size, CROP_PADDING, square=True), *_fit(d))


def targetpad_transform(target_ratio: float, d: int) -> Pipeline:
    """Pad to an aspect ratio, resize, centre crop."""
    return Pipeline(TargetPad(target_ratio), *_fit(d))


def train_transform(d: int) -> Pipeline:
    """Stretch to a little more than `d` x `d`, crop and mirror at random (`--transform resize`)."""
    side = d + RESIZE_MARGIN
    return Pipeline(_resize((side, side)), RandomCrop((d, d)), v2.RandomHorizontalFlip(0.5))


def inference_transform(d: int) -> Pipeline:
    """Stretch to `d` x `d`."""
    return Pipeline(_resize((d, d)))


def blip_image_train(d: int) -> Pipeline:
    """LAVIS's training transform without its RandAugment; FAFA uses neither, `load_model_and_preprocess` returns it."""
    crop = v2.RandomResizedCrop([d, d], scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return Pipeline(crop, v2.RandomHorizontalFlip(0.5))


@dataclass(frozen=True)
class TransformPair:
    """What `--transform` stands for: one transform for training pictures, one for all others."""

    train: Pipeline
    test: Pipeline
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
