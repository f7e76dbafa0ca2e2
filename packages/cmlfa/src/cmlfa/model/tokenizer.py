"""Captions as token ids: CLIP's byte-level BPE with a mask token in place of its last merge."""

import json
from collections.abc import Iterable
from functools import cache

import regex
import torch
from open_clip.tokenizer import SimpleTokenizer as ClipTokenizer
from torch import Tensor

MASK, START, END = "<|mask|>", "<|startoftext|>", "<|endoftext|>"
MASK_ID, START_ID, END_ID = 49405, 49406, 49407


class SimpleTokenizer(ClipTokenizer):
    """open_clip's CLIP tokenizer with the three specials of the released code.

    The vocabulary has CLIP's 49408 entries, except that id 49405, the last merge (`jekyll</w>`), is the mask token. That
    merge is left out as well, so the word becomes two pieces instead of having no id.

    Attributes:
        encoder: piece to id, the specials included.
    """

    def __init__(self) -> None:
        super().__init__()
        specials = {MASK: MASK_ID, START: START_ID, END: END_ID}
        self.encoder = {piece: index for piece, index in self.encoder.items() if index < MASK_ID} | specials
        self.decoder = {index: piece for piece, index in self.encoder.items()}
        self.bpe_ranks = {pair: rank for pair, rank in self.bpe_ranks.items() if "".join(pair) in self.encoder}
        self.cache = {special: special for special in specials}
        literals = "|".join(regex.escape(special) for special in specials)
        self.pat = regex.compile(literals + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
        self.vocab_size = len(self.encoder)
        self.all_special_ids = list(specials.values())
        self.sot_token_id, self.eot_token_id = START_ID, END_ID

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """The text of token ids; a space after each word, undecodable bytes as U+FFFD."""
        return super().decode([int(token) for token in tokens])


@cache
def shared_tokenizer() -> SimpleTokenizer:
    """The tokenizer of this process; building it reads the vocabulary file, and its cache of words grows with use."""
    return SimpleTokenizer()


def tokenize(caption: str, tokenizer: SimpleTokenizer, text_length: int = 77, truncate: bool = True) -> Tensor:
    """Token ids of one caption: start, pieces, end, then zeros.

    Args:
        caption: any text; it is cleaned and lower-cased.
        tokenizer: where the ids come from.
        text_length: length of the result.
        truncate: cut a longer caption and end it with the end token.

    Returns:
        int64 `[text_length]`.

    Raises:
        RuntimeError: the caption is too long and `truncate` is false.
    """
    ids = [START_ID, *tokenizer.encode(caption), END_ID]
    if len(ids) > text_length:
        if not truncate:
            raise RuntimeError(f"the caption has {len(ids)} tokens, more than the {text_length} allowed: {caption!r}")
        ids = [*ids[: text_length - 1], END_ID]
    return torch.tensor(ids + [0] * (text_length - len(ids)), dtype=torch.int64)


def tokenizer_files() -> dict[str, str]:
    """The tokenizer as files that transformers' `CLIPTokenizer` reads: name -> content.

    CMLFA pads with zeros; there the padding token is the end token, as in CLIP's own files.
    """
    tokenizer = shared_tokenizer()
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "mask_token": MASK,
        "pad_token": END,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(tokenizer.encoder, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
