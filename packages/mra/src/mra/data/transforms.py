"""From a PIL picture to the tensor the model reads. Resizing is Pillow's: resizing tensors gives other pixels."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Transform = Callable[[Image.Image], Tensor]

_AREA = (0.02, 0.4)
_ASPECT = 0.3
_ATTEMPTS = 100


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


class RandomErasing:
    """Fill a random rectangle of an image (Zhong et al., 2020) with the draws of the released code; torchvision's differ.

    Args:
        probability: of erasing anything.
        mean: value of each channel inside the rectangle (images are normalised before, so 0 is the mean colour).
        rng: generator of all draws, by default Python's global one.
    """

    def __init__(self, probability: float, mean: Sequence[float] = (0.0, 0.0, 0.0), rng: Any = random):
        self.probability, self.mean = probability, tuple(mean)
        # The module itself cannot be sent to a loader process; None stands for it.
        self._rng = None if rng is random else rng

    def __call__(self, image: Tensor) -> Tensor:
        """Image `[3, H, W]` with, perhaps, a rectangle of 2 to 40 % of its area erased; the input is untouched."""
        rng = random if self._rng is None else self._rng
        if rng.uniform(0, 1) > self.probability:
            return image
        height, width = image.shape[-2:]
        for _ in range(_ATTEMPTS):
            area = rng.uniform(*_AREA) * (height * width)
            aspect = rng.uniform(_ASPECT, 1 / _ASPECT)
            h, w = int(round((area * aspect) ** 0.5)), int(round((area / aspect) ** 0.5))
            if w < width and h < height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                erased = image.clone()
                for channel, value in enumerate(self.mean):
                    erased[channel, top : top + h, left : left + w] = value
                return erased
        return image
