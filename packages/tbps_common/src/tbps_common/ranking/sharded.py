"""One gallery spread over several processes: every process scores its own shard, all return the same result.

The gallery order is the shards in rank order. Each step that can fail on one process alone ends in `settle`, so that a
failure is raised by every process instead of leaving the others in a collective call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tbps_common.errors import InputError
from tbps_common.ranking.memory import is_out_of_memory


class Gallery(Protocol):
    """How the processes that share a gallery talk; with one process every method returns what it is given."""

    index: int
    size: int

    def settle(self, error: Exception | None) -> None: ...

    def highest(self, values: np.ndarray) -> np.ndarray: ...

    def total(self, values: np.ndarray) -> np.ndarray: ...

    def shards(self, values: np.ndarray) -> list[np.ndarray]: ...

    def same(self, values: dict[str, Any]) -> None: ...


class WholeGallery:
    """One process holds everything."""

    index, size = 0, 1

    def settle(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def highest(self, values: np.ndarray) -> np.ndarray:
        return values

    def total(self, values: np.ndarray) -> np.ndarray:
        return values

    def shards(self, values: np.ndarray) -> list[np.ndarray]:
        return [values]

    def same(self, values: dict[str, Any]) -> None:
        return


class ShardedGallery:
    """The processes of a `torch.distributed` group, each with its shard."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group needs torch.distributed to be initialised (torchrun does it).")
        self._dist, self._group = dist, group
        self.index = dist.get_rank(group)
        if self.index < 0:
            raise ValueError("This process is not a member of group.")
        self.size = dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def settle(self, error: Exception | None) -> None:
        """Go on if no process failed; else raise here too: the own error, or one that tells of another's."""
        own = 0 if error is None else 1 if is_out_of_memory(error) else 2
        worst = int(self._reduce(np.array([own]), self._dist.ReduceOp.MAX)[0])
        if own == 2 and error is not None:
            raise error
        if worst == 2:
            raise RuntimeError("Another process of the group failed while ranking; its message tells why.") from error
        if worst == 1:
            raise error if error is not None else torch.OutOfMemoryError("Another process ran out of memory.")

    def highest(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, self._dist.ReduceOp.MAX)

    def total(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, self._dist.ReduceOp.SUM)

    def shards(self, values: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes in rank order; they may differ in their first dimension."""
        lengths = self._gather(torch.tensor([len(values)], device=self._device))
        longest = max(int(length) for length in lengths)
        padded = np.zeros((longest, *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        gathered = self._gather(torch.from_numpy(padded).to(self._device))
        return [part[: int(length)].cpu().numpy() for part, length in zip(gathered, lengths)]

    def same(self, values: dict[str, Any]) -> None:
        """Refuse settings that are not equal on all processes: they would rank different things, or wait for ever."""
        everyone: list[Any] = [None] * self.size
        self._dist.all_gather_object(everyone, values, group=self._group)
        for name in values:
            if any(other[name] != everyone[0][name] for other in everyone):
                raise InputError(f"{name} must be the same on every process of the group.")

    def _reduce(self, values: np.ndarray, operation: Any) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self._device, copy=True)
        if tensor.numel():
            self._dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor.cpu().numpy()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        if tensor.numel():
            self._dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return parts


def open_gallery(group: Any) -> Gallery:
    """The gallery of this process alone, or its part in `group`."""
    return WholeGallery() if group is None else ShardedGallery(group)


@contextmanager
def settling(gallery: Gallery) -> Iterator[None]:
    """A step of one process that must not fail alone: an error inside is raised by every process of the gallery."""
    try:
        yield
    except Exception as error:
        gallery.settle(error)
        raise
    gallery.settle(None)
