"""Token masking, the text augmentation of training."""

from collections.abc import Iterable

import torch
from torch import Tensor

MASK_SHARE = 0.8
RANDOM_SHARE_OF_REST = 0.5


def mask_token_ids(
    input_ids: Tensor,
    probability: float,
    *,
    mask_token_id: int,
    protected_ids: Iterable[int],
    vocab_limit: int,
) -> Tensor:
    """Replace a share of the tokens: 80 % of them by the mask token, 10 % by random tokens, 10 % by themselves.

    Draws from torch's CPU generator, always in this order and in full: selection, mask or not, random or not, random
    tokens. Nothing is drawn for a probability of 0.

    Args:
        input_ids: int64, usually `[1, L]`; not changed.
        probability: of a token to be selected.
        mask_token_id: replaces most of the selected tokens.
        protected_ids: tokens that are never selected (start, end, padding).
        vocab_limit: random tokens are below it.

    Returns:
        A tensor of the same shape.
    """
    masked = input_ids.clone()
    if probability == 0:
        return masked
    selected = _draw(input_ids, probability)
    for token in protected_ids:
        selected &= input_ids != token
    to_mask = _draw(input_ids, MASK_SHARE)
    to_random = _draw(input_ids, RANDOM_SHARE_OF_REST)
    random_tokens = torch.randint(vocab_limit, input_ids.shape, dtype=torch.int64)
    masked[selected & to_mask] = mask_token_id
    replaced = selected & to_random & ~to_mask
    masked[replaced] = random_tokens[replaced]
    return masked


def _draw(like: Tensor, probability: float) -> Tensor:
    return torch.bernoulli(torch.full(like.shape, probability)).bool()
