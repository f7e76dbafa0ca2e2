"""Captions as token ids of fixed length, and the masking of words for masked language modelling (MLM)."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mra.text.vocabulary import read_vocabulary

IGNORED = -100


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


class TextMaskingGenerator:
    """Masks the token ids of one caption.

    Positions are drawn over the whole padded caption but its [CLS], so that [SEP] and [PAD] are predicted too (as
    released); with some probability a position becomes a span of 2 to `skipgram_size`; word pieces are masked with
    their whole word. A chosen token becomes [MASK] (80 %), a random one (10 %) or stays (10 %).

    Args:
        tokenizer_or_id2token: a tokenizer, or id -> token as a list or mapping ([CLS] and [MASK] are found by name).
        mask_prob: share of the positions to predict, at least one.
        mask_max: upper limit on their number.
        skipgram_prb: probability of a span.
        skipgram_size: longest span.
        mask_whole_word: extend a span over the word pieces (`##...`) of its words.
        rng: generator of all draws, by default Python's global one.
    """

    def __init__(
        self,
        tokenizer_or_id2token: Any,
        mask_prob: float,
        mask_max: int,
        skipgram_prb: float = 0.2,
        skipgram_size: int = 3,
        mask_whole_word: bool = True,
        rng: Any = random,
    ):
        tokens = _id_to_token(tokenizer_or_id2token)
        ids = {token: number for number, token in tokens.items()}
        for token in ("[CLS]", "[MASK]"):
            if token not in ids:
                raise ValueError(f"the vocabulary has no {token}")
        self._cls, self._mask, self._size = ids["[CLS]"], ids["[MASK]"], len(tokens)
        self._pieces = frozenset(number for number, token in tokens.items() if token.startswith("##"))
        self._mask_prob, self._mask_max = mask_prob, mask_max
        self._skipgram_prb, self._skipgram_size = skipgram_prb, skipgram_size
        self._whole_word = mask_whole_word
        # The module itself cannot be sent to a loader process; None stands for it.
        self._rng = None if rng is random else rng

    def __call__(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Mask one caption.

        Args:
            ids: padded token ids; the first one is [CLS].

        Returns:
            The ids with some replaced, and the positions to predict.

        Raises:
            ValueError: the caption does not begin with [CLS].
        """
        rng = random if self._rng is None else self._rng
        if not ids or ids[0] != self._cls:
            raise ValueError("a caption to be masked must begin with the id of [CLS]")
        masked = list(ids)
        positions = self._positions(masked, rng)
        for position in positions:
            if rng.random() < 0.8:
                masked[position] = self._mask
            elif rng.random() < 0.5:
                masked[position] = rng.randint(0, self._size - 1)
        return masked, positions

    def _positions(self, ids: list[int], rng: Any) -> list[int]:
        length = len(ids)
        wanted = min(self._mask_max, max(1, int(round(length * self._mask_prob))))
        candidates = list(range(1, length))
        rng.shuffle(candidates)
        # A real set, filled in this order: the released code goes on with its iteration order.
        chosen: set[int] = set()
        for candidate in candidates:
            if len(chosen) >= wanted:
                break
            if candidate in chosen:
                continue
            for position in range(*self._span(candidate, ids, rng)):
                if not 0 < position < length:
                    break
                chosen.add(position)
        positions = list(chosen)
        if len(positions) > wanted:
            rng.shuffle(positions)
            positions = positions[:wanted]
        return positions

    def _span(self, position: int, ids: list[int], rng: Any) -> tuple[int, int]:
        start, stop = position, position + 1
        if self._skipgram_prb > 0 and self._skipgram_size >= 2 and rng.random() < self._skipgram_prb:
            stop = position + rng.randint(2, self._skipgram_size)
        if self._whole_word:
            while start >= 0 and ids[start] in self._pieces:
                start -= 1
            while stop < len(ids) and ids[stop] in self._pieces:
                stop += 1
        return start, stop


def mlm_batch(
    ids: Tensor, generator: Callable[[Sequence[int]], tuple[list[int], list[int]]], max_masks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask a batch of captions, one after the other.

    Args:
        ids: `[B, T]` padded token ids.
        generator: masks one caption, as `TextMaskingGenerator` does.
        max_masks: M, at least the generator's `mask_max`.

    Returns:
        `ids_masked [B, T]`, `masked_pos [B, M]` (filled up with 0), `masked_ids [B, M]`: the hidden ids (filled up with
        -100, which the loss ignores). All int64 on the CPU.

    Raises:
        ValueError: the generator masks more than `max_masks` positions.
    """
    masked_rows, positions_rows, hidden_rows = [], [], []
    for row in ids.tolist():
        masked, positions = generator(row)
        padding = max_masks - len(positions)
        if padding < 0:
            raise ValueError(f"{len(positions)} positions were masked, more than max_masks {max_masks}")
        masked_rows.append(masked)
        positions_rows.append(positions + [0] * padding)
        hidden_rows.append([row[position] for position in positions] + [IGNORED] * padding)
    shape = (len(masked_rows), max_masks)
    return (
        torch.tensor(masked_rows, dtype=torch.int64).reshape(ids.shape),
        torch.tensor(positions_rows, dtype=torch.int64).reshape(shape),
        torch.tensor(hidden_rows, dtype=torch.int64).reshape(shape),
    )


def _id_to_token(source: Any) -> dict[int, str]:
    if hasattr(source, "get_vocab"):
        return {int(number): token for token, number in source.get_vocab().items()}
    if isinstance(source, Mapping):
        return {int(number): str(token) for number, token in source.items()}
    return dict(enumerate(source))
