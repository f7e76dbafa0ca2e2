"""Batches whose content depends on (seed, epoch, step) alone: not on workers, restarts or the number of processes.

`EpochBatches` decides which items make up a batch and gives every item a seed of its own; `SeededItems` draws the
item's augmentation from that seed. A run that stopped within an epoch goes on at the next batch without loading the
batches before it, and a run on N processes sees in every step the items that one process with an N times larger batch
would see.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tbps_common.errors import InputError

_WORD = (1 << 64) - 1


class ItemKey(NamedTuple):
    """What `EpochBatches` asks `SeededItems` for."""

    index: int
    seed: int


class EpochBatches(Sampler[list[ItemKey]]):
    """Batch sampler of one process.

    An epoch's order is `torch.randperm` from a generator seeded with `seed + epoch`; process r takes every
    `world_size`-th item from the r-th on. That is the rule of torch's DistributedSampler, so the items of a step, taken
    over all processes, are the same whatever the number of processes for the same global batch.

    Args:
        size: items of the data set.
        batch_size: of this process.
        seed: 0 to 2**32 - 1, the same on every process.
        rank: place of this process.
        world_size: number of processes.
        shuffle: otherwise the items come in their order.
        drop_last: leave out the items of the last, incomplete global batch. Otherwise the first items are repeated
            until every process has equally many, and the last batch may be smaller.

    Raises:
        InputError: with `drop_last`, the data set is smaller than one global batch; or it is empty.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        per_step = batch_size * world_size
        if size < (per_step if drop_last else 1):
            raise InputError(
                f"{size} training items do not fill one batch of {per_step} ({batch_size} on each of {world_size} "
                "process(es)): lower the batch size, or give more data"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch, self.first_batch = 0, 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with, of the next iteration."""
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, on every process."""
        own = self._items_per_process
        return own // self.batch_size if self.drop_last else -(-own // self.batch_size)

    def __len__(self) -> int:
        """Batches left of the epoch chosen by `set_position`."""
        return max(0, self.batches_per_epoch - self.first_batch)

    def __iter__(self) -> Iterator[list[ItemKey]]:
        epoch = self.epoch
        order = self._order(epoch)
        for batch in range(self.first_batch, self.batches_per_epoch):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            yield [ItemKey(index, item_seed(self.seed, epoch, index)) for index in indices]

    @property
    def _items_per_process(self) -> int:
        return self.size // self.world_size if self.drop_last else -(-self.size // self.world_size)

    def _order(self, epoch: int) -> torch.Tensor:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        needed = self._items_per_process * self.world_size
        if needed > self.size:
            order = order.repeat(-(-needed // self.size))
        return order[self.rank : needed : self.world_size]


def item_seed(seed: int, epoch: int, index: int) -> int:
    """A seed from 0 to 2**32 - 1 for one item of one epoch; neighbouring items get unrelated ones."""
    # The mixing of SplitMix64 (Steele, Lea, Flood 2014), applied to each of the three numbers.
    mixed = 0
    for number in (seed, epoch, index):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        mixed ^= mixed >> 31
    return mixed & 0xFFFFFFFF


class SeededItems(Dataset[Any]):
    """A map-style data set whose item `ItemKey(index, seed)` draws all its random numbers from `seed`.

    Python's, numpy's and torch's generators are seeded for the length of the item and then go on where they were, so
    that loading in the main process leaves the numbers for dropout alone.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: ItemKey) -> Any:
        index, seed = key
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
