"""Cleaning of captions, as LAVIS's `blip_caption` does it."""

import re

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
