"""From captions with image tokens and reference images to what the U-Net attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dp_gen import IMAGE_TOKEN
from dp_gen.model.captions import encode_with_image_tokens, get_img_token_idx
from tbps_common.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """A caption with its references; n of them, L text positions, R resolution.

    Attributes:
        plain: the caption without image tokens.
        input_ids: int64 [1, L].
        img_token_mask: bool [1, L].
        references: float [n, 3, R, R] in [0, 1]; the k-th belongs to the k-th marked position.
    """

    plain: str
    input_ids: Tensor
    img_token_mask: Tensor
    references: Tensor


def make_prompt(tokenizer: Any, description: str, references: Tensor, slots: int) -> Prompt:
    """Tokenise a description.

    Args:
        tokenizer: of `dp_gen.load_tokenizer`.
        description: with `IMAGE_TOKEN` after each phrase that has a reference.
        references: [n, 3, R, R].
        slots: references that the model takes, at most.

    Raises:
        InputError: there are not as many references as image tokens, or more than slots.
    """
    input_ids, mask = encode_with_image_tokens(tokenizer, description)
    tokens = description.count(IMAGE_TOKEN)
    get_img_token_idx(mask, slots)
    if len(references) != tokens:
        raise InputError(
            f"{len(references)} reference images for {tokens} image tokens {IMAGE_TOKEN} in {description!r}: "
            "the numbers must be equal"
        )
    if int(mask.sum()) != tokens:
        raise InputError(
            f"{tokens} image tokens mark {int(mask.sum())} words in {description!r}: put each {IMAGE_TOKEN} after its "
            f"own word, within the first {tokenizer.model_max_length} tokens"
        )
    return Prompt(description.replace(IMAGE_TOKEN, ""), input_ids, mask, references)


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids of plain captions, padded, or cut with their end token kept: int64 [B, L]."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return encoded["input_ids"]


@torch.no_grad()
def encode_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], slots: int, negative: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions with references, of the plain captions, and of the empty (or negative) caption.

    Returns:
        Three tensors [B, L, D] on the model's device.
    """
    weights = next(model.unet.parameters())
    resolution = prompts[0].references.shape[-1]
    references = torch.zeros(len(prompts), slots, 3, resolution, resolution)
    for row, prompt in zip(references, prompts):
        row[: len(prompt.references)] = prompt.references
    batch = {
        "input_ids": torch.cat([prompt.input_ids for prompt in prompts]),
        "img_token_mask": torch.cat([prompt.img_token_mask for prompt in prompts]),
        "attribute_v": references,
        "reference_attribute_num": torch.tensor([len(prompt.references) for prompt in prompts]),
    }
    cond = model.encode_condition({name: tensor.to(weights.device) for name, tensor in batch.items()})
    ids = plain_ids(tokenizer, [*(prompt.plain for prompt in prompts), negative]).to(weights.device)
    texts = model.encode_text(ids)
    null = texts[-1:].expand(len(prompts), -1, -1)
    return cond.to(weights.dtype), texts[:-1].to(weights.dtype), null.to(weights.dtype)
