"""Captions with image tokens: which text position carries which reference image."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from dp_gen import IMAGE_TOKEN
from dp_gen.model.hub import SD_MARKER, resolve_model
from tbps_common.errors import InputError

_BYTE_SYMBOLS = 256  # CLIP's vocabularies begin with a symbol for every byte
_LONGEST_TEXT = 100_000


def load_tokenizer(
    pretrained_model_hf: str, revision: str | None = None, *, cache_dir: str | None = None
) -> CLIPTokenizer:
    """The tokenizer of a Stable Diffusion model, with `IMAGE_TOKEN` added as its last id.

    Args:
        pretrained_model_hf: folder with a `tokenizer` subfolder (or of the tokenizer itself), or a hub name.
        revision: of the hub.
        cache_dir: of the hub's downloads.

    Raises:
        InputError: there is no readable tokenizer.
    """
    name = resolve_model(
        pretrained_model_hf, marker=SD_MARKER, flag="--pretrained_model_hf", revision=revision, cache_dir=cache_dir
    )
    folder = Path(name)
    own = folder.is_dir() and not (folder / "tokenizer").is_dir()
    place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if not own:
        place["subfolder"] = "tokenizer"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name, **place)
    except Exception as error:  # damaged files make the library fail with nearly any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the tokenizer of {pretrained_model_hf} cannot be read ({reason}): check that model's files"
        ) from error
    # Where files are absent transformers makes a tokenizer without words, or without a length, and says nothing.
    if tokenizer.vocab_size < _BYTE_SYMBOLS or tokenizer.model_max_length > _LONGEST_TEXT:
        raise InputError(
            f"the tokenizer of {pretrained_model_hf} is missing its vocabulary or its length: the model's tokenizer folder must "
            "hold vocab.json, merges.txt and tokenizer_config.json"
        )
    # Its id is beyond the text encoder's embeddings and never reaches them: `encode_with_image_tokens` takes it out.
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def encode_with_image_tokens(tokenizer: CLIPTokenizer, text: str) -> tuple[Tensor, Tensor]:
    """Token ids without the image tokens, and the positions that those marked.

    An image token marks the token before it, the end of its noun phrase. Two in a row mark that position once; one at
    the very beginning marks the start token. Longer captions are cut at the tokenizer's maximum, and lose their end
    token then, as released.

    Returns:
        `input_ids` int64 [1, L] and `img_token_mask` bool [1, L].
    """
    length = tokenizer.model_max_length
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    padding: Any = tokenizer.pad_token_id
    kept: list[int] = []
    marked: list[int] = []
    for token in tokenizer.encode(text, verbose=False):
        if token == image_token:
            marked.append(len(kept) - 1)
        else:
            kept.append(token)
    kept = kept[:length] + [padding] * (length - len(kept))
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, [position for position in marked if position < length]] = True
    return torch.tensor([kept], dtype=torch.int64), mask


def insert_image_tokens(description: str, segments: Iterable[Mapping[str, Any]]) -> str:
    """Put `IMAGE_TOKEN` at `end` of every segment; `end` counts characters of the untouched description."""
    for end in sorted((int(segment["end"]) for segment in segments), reverse=True):
        description = description[:end] + IMAGE_TOKEN + description[end:]
    return description


def get_img_token_idx(img_token_mask: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Positions of the marked tokens, padded to `num` slots.

    Args:
        img_token_mask: bool [1, L].
        num: slots N.

    Returns:
        `idx` int64 [1, N], ascending and padded with 0, and `idx_mask` bool [1, N], True where a slot is used.

    Raises:
        InputError: more positions are marked than there are slots.
    """
    positions = img_token_mask[0].nonzero()[:, 0]
    used = len(positions)
    if used > num:
        raise InputError(
            f"the caption has {used} image tokens, and --MAX_REFERENCE_ATTRIBUTE_NUM is {num}: raise it, or take "
            f"{IMAGE_TOKEN} out of the caption"
        )
    idx = torch.zeros(1, num, dtype=torch.int64)
    idx[0, :used] = positions
    return idx, (torch.arange(num) < used)[None]
