"""A caption as the model is to read it: optional cleaning, optional augmentation, a limit on the number of words."""

import random
import re
from typing import Any

from mra.text.augmentation import Synonyms, eda, has_words

_NOT_ALPHANUMERIC = re.compile("[^0-9a-z]+")


def pre_caption(
    caption: str,
    max_words: int,
    icfg_rstp: bool = False,
    is_eda: bool = False,
    rng: Any = random,
    synonyms: Synonyms | None = None,
) -> str:
    """Prepare one caption.

    Args:
        caption: as the annotation file holds it.
        max_words: a caption of more words is cut after this many, joined by single spaces; others keep their spacing.
        icfg_rstp: lower-case, and replace every run of other characters than 0-9 and a-z by one space.
        is_eda: return an augmented caption (`mra.eda`). A caption without letters is left unaugmented, without a draw.
        rng: generator of the augmentation.
        synonyms: see `mra.eda`.

    Raises:
        TypeError: `caption` is no string.
        ValueError: nothing is left of the caption.
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be a string, not {type(caption).__name__}: {caption!r}")
    text = _NOT_ALPHANUMERIC.sub(" ", caption.lower()) if icfg_rstp else caption
    if is_eda and has_words(text):
        text = eda(text, rng=rng, synonyms=synonyms)[0]
    words = text.split()
    if len(words) > max_words:
        text = " ".join(words[:max_words])
    if not text:
        raise ValueError(f"the caption {caption!r} is empty")
    return text
