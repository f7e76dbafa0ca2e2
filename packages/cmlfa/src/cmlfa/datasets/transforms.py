"""Image transforms of training and evaluation, on PIL images."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, ToTensor, v2

# Of the images CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PADDING = 10


def build_transforms(
    img_size: Sequence[int] = (384, 128), aug: bool = False, is_train: bool = True
) -> Callable[[Image.Image], Tensor]:
    """The transform from a PIL image to a normalised float32 tensor `[3, H, W]`.

    Draws come from torch's global generator, in the order flip, crop (top, left), erase.

    Args:
        img_size: height and width.
        aug: pad and crop, and erase a rectangle, beside the mirroring that training always does.
        is_train: False: resize and normalise only.
    """
    size = [int(side) for side in img_size]
    steps: list[Callable] = [v2.Resize(size, InterpolationMode.BILINEAR, antialias=True)]
    if is_train:
        steps.append(v2.RandomHorizontalFlip(0.5))
        if aug:
            steps += [v2.Pad(PADDING), v2.RandomCrop(size)]
    # Not v2's successors, which take twice as long and multiply by the inverse of 255: other last bits than as released.
    steps.append(ToTensor())
    steps.append(v2.Normalize(MEAN, STD, inplace=True))
    if is_train and aug:
        # The erased rectangle gets the numbers of the mean although the image is normalised: so the released code.
        value: Any = list(MEAN)
        steps.append(v2.RandomErasing(p=0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=value, inplace=True))
    return v2.Compose(steps)
