"""Which samples make up a batch, in the form that `transformers.Trainer` expects."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from tbps_common.run.batches import EpochBatches

_POOL_BATCHES = 50


class TrainingBatches(EpochBatches):
    """`EpochBatches` whose epoch the trainer sets, with an option to join texts of similar length.

    Args:
        size: samples of the data set.
        batch_size: of this process.
        seed: decides every order.
        rank: place of this process.
        world_size: number of processes.
        drop_last: leave the last, incomplete global batch out; otherwise it is filled from the beginning.
        lengths: of the samples' texts; `None`: samples are joined as they come.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        lengths: list[int] | None = None,
    ) -> None:
        super().__init__(size, batch_size, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last)
        self._lengths = None if lengths is None else torch.tensor(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.set_position(epoch)

    def _order(self, epoch: int) -> torch.Tensor:
        if self._lengths is None:
            return super()._order(epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.size, generator=generator)
        step = self.batch_size * self.world_size
        pools = [pool[self._lengths[pool].argsort(stable=True)] for pool in order.split(step * _POOL_BATCHES)]
        batches = torch.cat(pools).split(step)
        # The incomplete batch stays at the end, where it is dropped or filled up.
        whole = [batch for batch in batches if len(batch) == step]
        shuffled = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
        order = torch.cat([*shuffled, *(batch for batch in batches if len(batch) < step)])
        own = -(-self.size // self.world_size) if not self.drop_last else self.size // self.world_size
        needed = own * self.world_size
        if needed > self.size:
            order = order.repeat(-(-needed // self.size))
        return order[self.rank : needed : self.world_size]


class TrainingLoader(DataLoader[Any]):
    """A loader whose epoch the trainer can set."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)
