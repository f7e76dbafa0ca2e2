"""Features of dialogues: batches of similar length, and all lengths of one dialogue in a single pass.

Attention is causal, so the beginning of a dialogue has the same states whatever follows. A dialogue cut after n rounds is
the beginning of the full one, but for its last token or two: where a round ends in the middle of the text, its full stop
and the line break after it are one token. `encode_turns` therefore runs the longest text once and appends, for every
shorter one, just the tokens that differ, as branches that see their own beginning and nothing else.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from diana.model.diana import DiaNAModel
from diana.retrieval.features import evaluating, finished, in_halves
from diana.tokenizer import LENGTH_MULTIPLE, pad_id
from tbps_common.errors import InputError

logger = logging.getLogger("diana.retrieval")

_Encoded = tuple[Tensor, Tensor | None]
"""Features `[N, D]` and attributes `[N, K, D]` of one version."""


def encode_dialogues(
    model: DiaNAModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_seq_length: int,
    batch_size: int = 256,
    attributes: bool = False,
    sim_dtype: str = "fp32",
    pad_to_max: bool = False,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Encode texts; see `encode_turns` for the arguments.

    Returns:
        Unit-norm features `[Q, D]` and attributes `[Q, K, D]` (or None) in the order of `texts`, on the CPU.
    """
    return encode_turns(
        model,
        tokenizer,
        [[text] for text in texts],
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        attributes=attributes,
        sim_dtype=sim_dtype,
        pad_to_max=pad_to_max,
        progress=progress,
    )[0]


def encode_turns(
    model: DiaNAModel,
    tokenizer: PreTrainedTokenizerBase,
    versions: Sequence[Sequence[str]],
    *,
    max_seq_length: int,
    batch_size: int = 256,
    attributes: bool = False,
    sim_dtype: str = "fp32",
    pad_to_max: bool = False,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor | None]]:
    """Encode several versions of every dialogue, as a rule the dialogue cut after different numbers of rounds.

    Args:
        model: where it is, it computes.
        tokenizer: see `diana.tokenizer.load_tokenizer`.
        versions: for each of Q dialogues, V texts. What versions have in common at their beginning is computed once.
        max_seq_length: tokens of a text; longer ones lose their end; one warning counts them.
        batch_size: dialogues at a time; a batch that does not fit memory is encoded in halves.
        attributes: also give the refiner's attributes.
        sim_dtype: `fp32`, or `native` for features in the model's dtype.
        pad_to_max: pad every text to `max_seq_length` (as the released code does) instead of to its batch's longest.
        progress: show a bar on stderr.

    Returns:
        For each of the V versions: unit-norm features `[Q, D]` and attributes `[Q, K, D]` (or None), in the order of
        `versions`, on the CPU.

    Raises:
        InputError: no text, dialogues with different numbers of versions, or attributes of a model without refiner.
    """
    if not versions or len({len(texts) for texts in versions}) != 1:
        raise InputError("There must be dialogues to encode, each in equally many versions.")
    if max_seq_length < 1 or batch_size < 1:
        raise InputError(f"max_seq_length ({max_seq_length}) and batch size ({batch_size}) must be at least 1.")
    count = len(versions[0])
    options: dict[str, Any] = {
        "max_seq_length": max_seq_length,
        "batch_size": batch_size,
        "attributes": attributes,
        "sim_dtype": sim_dtype,
        "pad_to_max": pad_to_max,
        "progress": progress,
    }
    if count > 1 and model.attention == "flash_attention_2":  # which takes no mask of one's own
        columns = [[[texts[number]] for texts in versions] for number in range(count)]
        return [encode_turns(model, tokenizer, column, **options)[0] for column in columns]
    trees = prefix_trees(tokenizer, versions, max_seq_length)
    # The longest first: if memory does not suffice, it shows at once.
    order = sorted(range(len(trees)), key=lambda place: trees[place].size, reverse=True)
    length = max_seq_length if pad_to_max else 0

    def run(batch: Sequence[Tree]) -> list[_Encoded]:
        return [
            (finished(embeds, sim_dtype), None if dense is None else finished(model.refine(dense, mask), sim_dtype))
            for embeds, dense, mask in _states(model, batch, pad_id(tokenizer), length, attributes)
        ]

    parts: list[list[_Encoded]] = []
    with tqdm(total=len(trees), unit="dialogue", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = [trees[place] for place in order[start : start + batch_size]]
            with evaluating(model):
                parts.extend(in_halves(run, batch))
            bar.update(len(batch))
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return [_joined([part[version] for part in parts], back) for version in range(count)]


def _joined(parts: list[_Encoded], back: Tensor) -> _Encoded:
    refined = [attributes for _, attributes in parts if attributes is not None]
    return torch.cat([embeds for embeds, _ in parts])[back], torch.cat(refined)[back] if refined else None


@dataclass(frozen=True)
class Tree:
    """Versions of one dialogue: the longest as the trunk, of the others what differs from it.

    Attributes:
        trunk: token ids.
        branches: of every version, how many tokens of the trunk it shares, and its own tokens after them.
    """

    trunk: list[int]
    branches: list[tuple[int, list[int]]]

    @property
    def size(self) -> int:
        return len(self.trunk) + sum(len(own) for _, own in self.branches)


def prefix_trees(
    tokenizer: PreTrainedTokenizerBase, versions: Sequence[Sequence[str]], max_seq_length: int
) -> list[Tree]:
    """Versions of each dialogue as token ids; what the versions share stands there once. Too long ones are cut."""
    texts = list(dict.fromkeys(text for dialogue in versions for text in dialogue))
    whole = tokenizer(texts, verbose=False)["input_ids"]
    longer = sum(len(ids) > max_seq_length for ids in whole)
    if longer:
        logger.warning(
            "%d of %d texts are longer than %d tokens (--max_seq_length): their last answers are cut off",
            longer,
            len(texts),
            max_seq_length,
        )
    ids_of = {text: ids[:max_seq_length] for text, ids in zip(texts, whole)}
    return [_tree([ids_of[text] for text in dialogue]) for dialogue in versions]


def _tree(rows: list[list[int]]) -> Tree:
    trunk = max(rows, key=len)
    branches = []
    for row in rows:
        shared = next((place for place, (one, other) in enumerate(zip(row, trunk)) if one != other), len(row))
        branches.append((shared, row[shared:]))
    return Tree(trunk, branches)


def _states(
    model: DiaNAModel, batch: Sequence[Tree], pad: int, length: int, with_tokens: bool
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """For every version: features `[B, D]`, tokens `[B, L, D]` (or None) and their mask `[B, L]`."""
    if len(batch[0].branches) == 1:
        ids, mask = _padded([tree.trunk for tree in batch], pad, length)
        embeds, dense = model.encode_text(ids, mask, padding_outputs=False)
        yield embeds, dense if with_tokens else None, mask
        return
    ids, _ = _padded([tree.trunk + [token for _, own in tree.branches for token in own] for tree in batch], pad, 0)
    places, positions, shared, first = _geometry(batch, ids.shape[1])
    # Where every version is the plain beginning of the longest one, causal attention is all it takes.
    if any(own for tree in batch for _, own in tree.branches):
        dense = model.encode_tokens(ids, positions, _visible(shared.to(model.device), first.to(model.device)))
    else:
        dense = model.encode_tokens(ids)
    rows = torch.arange(len(batch))
    for version in range(len(batch[0].branches)):
        index, mask = _padded([own[version] for own in places], 0, length)
        last = index[rows, mask.sum(dim=1) - 1]
        yield dense[rows, last], dense[rows[:, None], index] if with_tokens else None, mask


def _padded(rows: list[list[int]], fill: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows as `[N, L]` and their mask; L is `length`, or the longest row rounded up."""
    longest = max(len(row) for row in rows)
    length = max(length, longest) if length else -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    values = torch.full((len(rows), length), fill, dtype=torch.int64)
    mask = torch.zeros_like(values)
    for number, row in enumerate(rows):
        values[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return values, mask


def _geometry(batch: Sequence[Tree], length: int) -> tuple[list[list[list[int]]], Tensor, Tensor, Tensor]:
    """Where things are in the sequences trunk + branches.

    Returns:
        For every tree and version the places of its tokens; and for every place `[B, L]`: its position in its
        version, how many places of the trunk its version shares, and the place where its own segment begins.
    """
    places: list[list[list[int]]] = []
    positions = torch.arange(length).repeat(len(batch), 1)
    shared_with = torch.zeros(len(batch), length, dtype=torch.int64)
    first = torch.zeros_like(shared_with)
    for number, tree in enumerate(batch):
        places.append([])
        start = len(tree.trunk)
        for shared, own in tree.branches:
            stop = start + len(own)
            positions[number, start:stop] = torch.arange(shared, shared + len(own))
            shared_with[number, start:stop] = shared
            first[number, start:stop] = start
            places[-1].append([*range(shared), *range(start, stop)])
            start = stop
    return places, positions, shared_with, first


def _visible(shared: Tensor, first: Tensor) -> Tensor:
    """Boolean mask `[B, 1, L, L]`: a place sees what its version shares of the trunk, and its own segment up to itself."""
    length = shared.shape[1]
    column = torch.arange(length, device=shared.device)
    own = (column >= first[:, :, None]) & (column <= column[:, None])
    return ((column < shared[:, :, None]) | own)[:, None]
