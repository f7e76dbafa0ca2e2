"""From a PIL picture to the tensor the model reads. Resizing is Pillow's: resizing tensors gives other pixels."""

import random
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mra.data.erasing import RandomErasing

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Transform = Callable[[Image.Image], Tensor]


def build_transforms(config: dict[str, Any], rng: Any = random) -> dict[str, Transform]:
    """The three transforms of a task.

    Args:
        config: `h`, `w` (pixels) and `erasing_p`.
        rng: generator of the erasing; flips use torch's.

    Returns:
        `test`, `train` (fine-tuning: flip and erasing; captions are not changed by a flip) and `box` (pre-training,
        where cropping and flipping come before: erasing). Each maps an RGB picture to a float tensor `[3, h, w]`.
    """
    resize = transforms.Resize((config["h"], config["w"]), interpolation=InterpolationMode.BICUBIC)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    erasing = RandomErasing(config.get("erasing_p", 0.0), rng=rng)
    return {
        "test": transforms.Compose([resize, *to_tensor]),
        "train": transforms.Compose([resize, transforms.RandomHorizontalFlip(0.5), *to_tensor, erasing]),
        "box": transforms.Compose([resize, *to_tensor, erasing]),
    }
