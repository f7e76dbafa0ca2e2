"""BERT's WordPiece tokenizer from its vocabulary file, and captions as token ids of fixed length."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mra.text.vocabulary import read_vocabulary


def build_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The uncased BERT tokenizer of a folder; its `vocab.txt` is all that is read.

    Raises:
        InputError: see `read_vocabulary`.
    """
    vocabulary = read_vocabulary(path)
    # The Rust tokenizer starts threads, and warns when the process is forked afterwards (loader workers).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import BertTokenizer

    return BertTokenizer(vocab=vocabulary, do_lower_case=True)


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids padded or cut to exactly `max_tokens`: the text feature averages over the padding too.

    Returns:
        `[N, max_tokens]` int64 ids and attention mask (1 for tokens, 0 for padding).
    """
    if not texts:  # the tokenizer expects at least one
        return torch.empty(0, max_tokens, dtype=torch.int64), torch.empty(0, max_tokens, dtype=torch.int64)
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=max_tokens, return_token_type_ids=False
    )
    return (
        torch.tensor(encoded["input_ids"], dtype=torch.int64),
        torch.tensor(encoded["attention_mask"], dtype=torch.int64),
    )
