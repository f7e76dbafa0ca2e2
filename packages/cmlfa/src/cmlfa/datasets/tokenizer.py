"""The masking of words for the MLM loss; the tokenizer itself belongs to the model."""

import random
from types import ModuleType

import torch
from torch import Tensor

from cmlfa.model.tokenizer import (
    END,
    END_ID,
    MASK,
    MASK_ID,
    START,
    START_ID,
    SimpleTokenizer,
    shared_tokenizer,
    tokenize,
)

__all__ = [
    "END",
    "END_ID",
    "MASK",
    "MASK_ID",
    "START",
    "START_ID",
    "SimpleTokenizer",
    "mask_tokens",
    "shared_tokenizer",
    "tokenize",
]

MASKED_SHARE = 0.15
_REPLACEMENTS = range(1, MASK_ID)


def mask_tokens(ids: Tensor, rng: random.Random | ModuleType = random) -> tuple[Tensor, Tensor]:
    """Mask 15 % of the words of a caption: 80 % become the mask token, 10 % a random token, 10 % stay.

    Start, end, mask and padding are never chosen. When no word was, the one after the start token is masked, so every
    caption has at least one label. The draws are those of the released code, in its order: one `random()` per word,
    and one `choice` per random token.

    Args:
        ids: int64 `[L]` of one caption; not changed.
        rng: the `random` module or a `random.Random`.

    Returns:
        The masked ids `[L]`, and the labels `[L]`: the original id where a word was chosen, 0 elsewhere.
    """
    tokens = ids.tolist()
    labels = [0] * len(tokens)
    for position, token in enumerate(tokens):
        if not 0 < token < MASK_ID:
            continue
        draw = rng.random()
        if draw >= MASKED_SHARE:
            continue
        draw /= MASKED_SHARE
        if draw < 0.8:
            tokens[position] = MASK_ID
        elif draw < 0.9:
            tokens[position] = rng.choice(_REPLACEMENTS)
        labels[position] = token
    if not any(labels):
        labels[1] = tokens[1]
        tokens[1] = MASK_ID
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)
