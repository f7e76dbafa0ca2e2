"""Cleaning of captions, and the image processors that LAVIS's configuration names."""

import re
from typing import Any

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class BlipCaptionProcessor:
    """Lower case, some punctuation to spaces, runs of white space to one space, at most `max_words` words.

    Apostrophes, commas, hyphens and slashes stay, and so does a single tab or line break inside.

    Args:
        prompt: put in front of the result.
        max_words: words (separated by single spaces) that are kept.
    """

    def __init__(self, prompt: str = "", max_words: int = 50):
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """The cleaned caption."""
        text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", caption.lower())).rstrip("\n").strip(" ")
        words = text.split(" ")
        if len(words) > self.max_words:
            text = " ".join(words[: self.max_words])
        return self.prompt + text


def blip_image_train(image_size: int) -> Any:
    """Training transform of LAVIS's BLIP-2 without its RandAugment (FAFA uses neither): PIL image to `[3, S, S]`."""
    from torchvision import transforms

    from fafa.transforms import MEAN, STD

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                image_size, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
