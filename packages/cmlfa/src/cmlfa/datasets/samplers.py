"""Samplers that put several captions of each person into a batch."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from tbps_common.errors import InputError


class RandomIdentitySampler(Sampler[int]):
    """Batches of `batch_size // num_instances` persons with `num_instances` captions each, for one process.

    Draws come from the global generators of `random` and `numpy.random`.

    Args:
        data_source: training items, whose first entry is the person id.
        batch_size: captions per batch.
        num_instances: captions per person in a batch.

    Raises:
        InputError: the batch is smaller than one person's captions, or there are fewer persons than a batch needs.
    """

    def __init__(self, data_source: Sequence[tuple[Any, ...]], batch_size: int, num_instances: int):
        self.persons_per_batch = _persons_per_batch(batch_size, num_instances, "batch_size")
        self.num_instances = num_instances
        self.indices_of = _indices_of(data_source, self.persons_per_batch)
        # What one epoch can give at most: persons left over at its end do not fill a batch.
        self.length = sum(
            max(len(indices), num_instances) // num_instances * num_instances for indices in self.indices_of.values()
        )

    def __iter__(self) -> Iterator[int]:
        groups = {pid: self._cut(indices) for pid, indices in self.indices_of.items()}
        available = list(groups)
        order: list[int] = []
        while len(available) >= self.persons_per_batch:
            for pid in random.sample(available, self.persons_per_batch):
                order += groups[pid].pop(0)
                if not groups[pid]:
                    available.remove(pid)
        return iter(order)

    def _cut(self, indices: list[int]) -> list[list[int]]:
        """Groups of `num_instances` captions of one person in random order, the remainder left out."""
        chosen = list(indices)
        if len(chosen) < self.num_instances:
            chosen = np.random.choice(chosen, size=self.num_instances, replace=True).tolist()
        random.shuffle(chosen)
        whole = len(chosen) // self.num_instances * self.num_instances
        return [chosen[start : start + self.num_instances] for start in range(0, whole, self.num_instances)]

    def __len__(self) -> int:
        return self.length


class DistributedIdentitySampler(Sampler[int]):
    """The identity sampler for several processes: all draw the same epoch, each keeps its own share of the batches.

    An epoch is a function of `seed` and the epoch number, so every process can draw it alone; call `set_epoch` before
    each.

    Args:
        data_source: training items, whose first entry is the person id.
        batch_size: captions per step of all processes together.
        num_instances: captions per person in a batch.
        rank: this process.
        world_size: number of processes.
        seed: the same on all processes.

    Raises:
        InputError: the share of one process is smaller than one person's captions, or there are too few persons.
    """

    def __init__(
        self,
        data_source: Sequence[tuple[Any, ...]],
        batch_size: int,
        num_instances: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.share = batch_size // world_size
        self.persons_per_batch = _persons_per_batch(self.share, num_instances, "batch_size divided by the processes")
        self.share = self.persons_per_batch * num_instances
        self.num_instances = num_instances
        self.indices_of = _indices_of(data_source, self.persons_per_batch)
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw that epoch."""
        self.order = self._draw(epoch)

    def __iter__(self) -> Iterator[int]:
        # Every process must take the same number of steps, or the others would wait for it forever.
        for step in range(len(self) // self.share):
            start = (step * self.world_size + self.rank) * self.share
            yield from self.order[start : start + self.share]

    def _draw(self, epoch: int) -> list[int]:
        rng = np.random.RandomState([self.seed, epoch])
        left: dict[Any, list[int]] = {}
        available = list(self.indices_of)
        order: list[int] = []
        while len(available) >= self.persons_per_batch:
            for position in rng.choice(len(available), self.persons_per_batch, replace=False):
                pid = available[position]
                if pid not in left:
                    indices = self.indices_of[pid]
                    if len(indices) < self.num_instances:
                        indices = rng.choice(indices, size=self.num_instances, replace=True).tolist()
                    left[pid] = rng.permutation(indices).tolist()
                order += left[pid][: self.num_instances]
                left[pid] = left[pid][self.num_instances :]
            available = [pid for pid in available if pid not in left or len(left[pid]) >= self.num_instances]
        return order

    def __len__(self) -> int:
        return len(self.order) // self.share // self.world_size * self.share


def _persons_per_batch(batch_size: int, num_instances: int, name: str) -> int:
    if not 1 <= num_instances <= batch_size:
        raise InputError(
            f"--num_instance {num_instances} does not fit into a batch of {batch_size} (--{name}): "
            "choose a smaller --num_instance or a larger --batch_size."
        )
    return batch_size // num_instances


def _indices_of(data_source: Sequence[tuple[Any, ...]], persons_per_batch: int) -> dict[Any, list[int]]:
    """Caption indices of each person, persons in order of first appearance."""
    indices_of: dict[Any, list[int]] = {}
    for index, item in enumerate(data_source):
        indices_of.setdefault(item[0], []).append(index)
    if len(indices_of) < persons_per_batch:
        raise InputError(
            f"The identity sampler needs {persons_per_batch} persons for a batch, but the training split has "
            f"{len(indices_of)}: choose a smaller --batch_size or a larger --num_instance."
        )
    return indices_of
