"""Random erasing (Zhong et al., 2020) with the draws of the released code; torchvision's makes other ones."""

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_AREA = (0.02, 0.4)
_ASPECT = 0.3
_ATTEMPTS = 100


class RandomErasing:
    """Fill a random rectangle of an image.

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
