"""One gallery spread over several processes: every process scores its own shard, all return the same result.

The gallery order is the shards in rank order. Each step that can fail on one process alone stands inside `together`, so
that a failure is raised by every process instead of leaving the others in a collective call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tbps_common.errors import InputError
from tbps_common.ranking.memory import is_out_of_memory


class Shards:
    """The processes that share a gallery. Without a group it is this one alone, and all values come back as they are.

    Attributes:
        index: of this process's shard.
        count: number of shards.
    """

    def __init__(self, group: Any = None) -> None:
        """Join the other processes of a `torch.distributed` group.

        Raises:
            ValueError: torch.distributed is not initialised, or this process is not in the group.
        """
        self.index, self.count, self._group = 0, 1, group
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group needs torch.distributed to be initialised (torchrun does it).")
        self.index, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.index < 0:
            raise ValueError("This process is not a member of group.")
        nccl = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that must not fail alone: an error inside is raised by every process, as its own or as another's."""
        try:
            yield
        except Exception as error:
            self._settle(error)
            raise
        self._settle(None)

    def _settle(self, error: Exception | None) -> None:
        own = 0 if error is None else 1 if is_out_of_memory(error) else 2
        worst = int(self.highest(np.array([own]))[0])
        if own == 2 or worst == 0:
            return
        if worst == 2:
            raise RuntimeError(
                "Another process of the group failed while ranking; see its message for the cause."
            ) from error
        if error is None:
            raise torch.OutOfMemoryError("Another process ran out of memory.")

    def highest(self, values: np.ndarray) -> np.ndarray:
        """The element-wise maximum over all processes."""
        return self._reduce(values, "MAX")

    def total(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum over all processes."""
        return self._reduce(values, "SUM")

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes in rank order; they may differ in their first dimension."""
        if self._group is None:
            return [values]
        lengths = [int(length) for length in self._gather(torch.tensor([len(values)], device=self._device))]
        padded = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        gathered = self._gather(torch.from_numpy(padded).to(self._device))
        return [part[:length].cpu().numpy() for part, length in zip(gathered, lengths)]

    def require_same(self, values: dict[str, Any]) -> None:
        """Refuse settings that are not equal on all processes: they would rank different things, or wait for ever."""
        if self._group is None:
            return
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, values, group=self._group)
        for name in values:
            if any(other[name] != everyone[0][name] for other in everyone):
                raise InputError(f"{name} must be the same on every process of the group.")

    def _reduce(self, values: np.ndarray, operation: str) -> np.ndarray:
        if self._group is None or values.size == 0:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self._device, copy=True)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation), group=self._group)
        return tensor.cpu().numpy()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        if tensor.numel():
            dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return parts
