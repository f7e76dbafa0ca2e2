"""The Llama-3 tokenizer as DiaNA uses it: a start token, never an end token, padding and truncation on the right."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diana.model.folders import resolve_folder
from tbps_common.errors import CheckpointError, InputError

PAD_TOKEN = "<|finetune_right_pad_id|>"
MASK_TOKEN = "<|reserved_special_token_0|>"
ORDINARY_LIMIT = 128_000
"""Llama-3's ids below this are ordinary tokens, the special ones follow."""

LENGTH_MULTIPLE = 8
"""Batches padded to their longest text are rounded up to this, which matrix units like."""


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a tokenizer with padding and mask token set (where it has none), and make sure it appends no end token.

    Args:
        source: a folder with `tokenizer.json`, one with `checkpoint-N` folders (the highest with a tokenizer is taken),
            or a repository on the Hugging Face hub.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, lacks a token, or encodes texts otherwise.
    """
    place = _find(source)
    try:
        # AutoTokenizer would read config.json first and stumble over DiaNA's model type.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"The tokenizer of {source} cannot be loaded ({reason}); copy or download it again."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _known(tokenizer, PAD_TOKEN, source)
    if tokenizer.mask_token is None:
        tokenizer.mask_token = _known(tokenizer, MASK_TOKEN, source)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    ids = tokenizer("a")["input_ids"]
    if len(ids) != 2 or ids[0] != tokenizer.bos_token_id:
        raise CheckpointError(
            f"The tokenizer of {source} encodes 'a' as {ids}, not as a start token and one token: it was saved with "
            "add_eos_token; take the tokenizer files of Llama-3.2, or of the released checkpoint."
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, entries: int, source: str | os.PathLike[str]) -> None:
    """Require an embedding for every token: a GPU answers a token without one with an error that names nothing.

    Args:
        tokenizer: to be checked.
        entries: rows of the model's token embedding.
        source: of the tokenizer, for the message.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
    """
    if len(tokenizer) > entries:
        raise CheckpointError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the model's embedding {entries}: take the tokenizer "
            "that belongs to the weights."
        )


def _find(source: str | os.PathLike[str]) -> str:
    folder = Path(source)
    if folder.is_dir():
        if (folder / "tokenizer.json").is_file():
            return str(folder)
        numbered = [entry for entry in folder.glob("checkpoint-*") if (entry / "tokenizer.json").is_file()]
        numbered = [entry for entry in numbered if entry.name.removeprefix("checkpoint-").isdecimal()]
        if numbered:
            return str(max(numbered, key=lambda entry: int(entry.name.removeprefix("checkpoint-"))))
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json); give a checkpoint folder with one.")
    return str(resolve_folder(source, weights=False))


def _known(tokenizer: PreTrainedTokenizerBase, token: str, source: str | os.PathLike[str]) -> str:
    if token not in tokenizer.get_vocab():
        raise CheckpointError(f"The tokenizer of {source} has no token {token}: take one of the Llama-3.2 family.")
    return token


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_seq_length: int,
    pad_to_max: bool = True,
    *,
    multiple: int = LENGTH_MULTIPLE,
) -> dict[str, Tensor]:
    """Token ids and attention masks, int64 `[B, L]`; longer texts lose their end.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: any number of texts but none.
        max_seq_length: tokens, the start token included.
        pad_to_max: L is `max_seq_length`; otherwise the length of the longest text.
        multiple: a longest text is rounded up to this, within `max_seq_length`.

    Raises:
        InputError: the limit is below 1.
    """
    if max_seq_length < 1:
        raise InputError(f"max_seq_length must be at least 1, but it is {max_seq_length}.")
    rows = tokenizer(list(texts), truncation=True, max_length=max_seq_length, verbose=False)["input_ids"]
    longest = max(len(row) for row in rows)
    length = max_seq_length if pad_to_max else min(-(-longest // multiple) * multiple, max_seq_length)
    input_ids = torch.full((len(rows), length), pad_id(tokenizer), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
        attention_mask[number, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the padding token, which `load_tokenizer` has made sure of."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ordinary tokens; their ids come first."""
    return min(ORDINARY_LIMIT, tokenizer.vocab_size)
