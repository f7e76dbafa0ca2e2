"""Captions on their way into the model: cleaning, augmentation, token ids, masking.

The names are loaded on first use: the vocabulary and WordNet are checked before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra.text.augmentation import eda
    from mra.text.captions import pre_caption
    from mra.text.masking import TextMaskingGenerator, mlm_batch
    from mra.text.tokenizer import build_tokenizer, tokenize

__all__ = ["TextMaskingGenerator", "build_tokenizer", "eda", "mlm_batch", "pre_caption", "tokenize"]

_HOME = {
    "eda": "mra.text.augmentation",
    "TextMaskingGenerator": "mra.text.masking",
    "build_tokenizer": "mra.text.tokenizer",
    "mlm_batch": "mra.text.masking",
    "pre_caption": "mra.text.captions",
    "tokenize": "mra.text.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
