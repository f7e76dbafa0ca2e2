"""What training does to a sample, and evaluation to an image: transforms (PIL in, float `[3, H, W]` out), token masking.

The constants are those of the released code.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

PADDING = 10
ERASED_AREA = (0.02, 0.4)

MASK_SHARE = 0.8
RANDOM_SHARE_OF_REST = 0.5

Transform = Callable[[Image.Image], Tensor]


class ToRGB:
    """Any mode to RGB."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")


def build_train_transform(image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize, flip, pad and crop, normalise, erase a rectangle.

    The erased rectangle is filled with the mean vector *after* normalisation (so it is not the mean colour), as in the
    released code.

    Args:
        image_size: height and width.
        mean: of the data set, per channel; the same for `std`.
        std: standard deviation per channel.
    """
    erased: Any = list(mean)  # torchvision's annotation knows numbers only
    return transforms.Compose(
        [
            ToRGB(),
            _resize(image_size),
            transforms.RandomHorizontalFlip(0.5),
            transforms.Pad(PADDING, fill=0),
            transforms.RandomCrop(tuple(image_size)),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            transforms.RandomErasing(scale=ERASED_AREA, value=erased),
        ]
    )


def build_eval_transform(image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize to height and width (the aspect ratio is not kept) and normalise."""
    return transforms.Compose([ToRGB(), _resize(image_size), transforms.ToTensor(), transforms.Normalize(mean, std)])


def _resize(image_size: Sequence[int]) -> transforms.Resize:
    return transforms.Resize(tuple(image_size), interpolation=transforms.InterpolationMode.BILINEAR)


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
