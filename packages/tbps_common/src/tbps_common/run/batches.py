"""Batches whose content depends on (seed, epoch, step) alone: not on workers, restarts or the number of processes.

`EpochBatches` decides which items make up a batch and gives every item a seed of its own; `SeededItems` draws the
item's augmentation from that seed. A run that stopped within an epoch goes on at the next batch without loading the
batches before it, and a run on N processes sees in every step the items that one process with an N times larger batch
would see.
"""

import gc
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tbps_common.errors import DatasetError, ImageError, InputError
from tbps_common.run.command import usable_processors
from tbps_common.run.distributed import gather_objects

logger = logging.getLogger(__name__)

_WORD = (1 << 64) - 1
_SHOWN = 5


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


class ReplacedItems:
    """The items of a data set whose image cannot be read, each replaced by the next one whose image can.

    Which item takes a place depends on the files alone, so it is the same in every epoch, on every process and after a
    restart, and batches keep their size. Loader processes note what they meet in shared memory, one byte per item.

    Args:
        size: items of the data set.
    """

    def __init__(self, size: int) -> None:
        self._unreadable = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self._reported = 0

    def load(self, index: int, read: Callable[[int], Any]) -> Any:
        """`read(index)`, or that of the next index (the first follows the last) that raises no `ImageError`.

        Raises:
            DatasetError: no image of the data set can be read.
        """
        size, problem = len(self._unreadable), "all of them were tried before"
        for candidate in (*range(index, size), *range(index)):
            if self._unreadable[candidate]:
                continue
            try:
                return read(candidate)
            except ImageError as error:
                self._unreadable[candidate] = 1
                problem = str(error)
        raise DatasetError(f"no image of the {size} training items can be read: {problem}")

    def report(self, path: Callable[[int], str]) -> str | None:
        """A sentence for the log, if any process of the job met unreadable images since the last report.

        Every process must call it, and gets the same sentence.

        Args:
            path: of an item's image.
        """
        own: list[int] = self._unreadable.nonzero().flatten().tolist()
        together = sorted(set().union(*gather_objects(own)))
        if len(together) == self._reported:
            return None
        self._reported = len(together)
        shown = ", ".join(path(index) for index in together[:_SHOWN])
        more = f" and {len(together) - _SHOWN} more" if len(together) > _SHOWN else ""
        return (
            f"{len(together)} of {len(self._unreadable)} training items met so far have an image that cannot be read, and "
            f"the next item takes their place: {shown}{more}"
        )


def replaced_items(bad_images: str, size: int) -> ReplacedItems | None:
    """What the flag `--bad_images` asks for: None for `stop`."""
    return ReplacedItems(size) if bad_images == "skip" else None


class ReplacingItems(Dataset[Any]):
    """A map-style data set that passes over items whose image cannot be read.

    Args:
        dataset: its items must read their image before they draw a random number.
        replaced: keeps count.
    """

    def __init__(self, dataset: Any, replaced: ReplacedItems) -> None:
        self.dataset, self.replaced = dataset, replaced

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.replaced.load(index, self.dataset.__getitem__)


class SeededItems(Dataset[Any]):
    """A map-style data set whose item `ItemKey(index, seed)` draws all its random numbers from `seed`.

    Python's, numpy's and torch's generators are seeded for the length of the item and then go on where they were, so
    that loading in the main process leaves the numbers for dropout alone.

    Args:
        dataset: map-style data set.
        replaced: passes over items whose image cannot be read; otherwise their `ImageError` ends the run.
    """

    def __init__(self, dataset: Any, replaced: ReplacedItems | None = None) -> None:
        self.dataset, self.replaced = dataset, replaced

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: ItemKey) -> Any:
        index, seed = key

        def read(number: int) -> Any:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.dataset[number]

        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return read(index) if self.replaced is None else self.replaced.load(index, read)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def freeze_memory() -> None:
    """Take what exists now out of garbage collection, before loader processes are forked.

    A collection writes to every object that it walks over, and so copies the memory that processes share.
    """
    gc.collect()
    gc.freeze()


def usable_workers(requested: int) -> int:
    """Loader processes to start: as many as asked for, but not more than this process may use processors.

    More of them only get in each other's way; a line in the log says how many there are instead.
    """
    processors = usable_processors()
    if requested > processors:
        logger.info(
            "starting %d processes that load data instead of %d: there are no more processors", processors, requested
        )
    return min(requested, processors)
