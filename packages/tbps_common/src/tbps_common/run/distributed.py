"""One process or many: which of them this is, and the few collectives that training and evaluation share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tbps_common.errors import InputError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those that torchrun started (the default: the only one)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read torchrun's `RANK`, `WORLD_SIZE` and `LOCAL_RANK`.

        Raises:
            InputError: a variable is not a number, or they contradict each other.
        """
        world_size = _environment_number("WORLD_SIZE", 1)
        rank = _environment_number("RANK", 0)
        local_rank = _environment_number("LOCAL_RANK", 0)
        if world_size < 1 or not 0 <= rank < world_size or local_rank < 0:
            raise InputError(
                f"RANK={rank}, WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} contradict each other; "
                "start several processes with torchrun, or unset these variables."
            )
        return cls(rank, world_size, local_rank)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise InputError(f"Environment variable {name} is {text!r}, not a number; start with torchrun.") from None


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10) -> Iterator[Ranks]:
    """Join the processes started by torchrun for the length of the context; nothing to do for a single process.

    Args:
        device: `cuda` uses NCCL, one GPU per process (chosen by the local rank); anything else uses gloo.
        timeout_minutes: how long a collective waits for a process that does not come, before the job fails.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    ranks = Ranks.from_environment()
    if not ranks.distributed:
        yield ranks
        return
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"Process {ranks.local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} found); "
                "lower --nproc-per-node of torchrun, or run on the CPU."
            )
        own = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", timeout=timeout, device_id=own)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield ranks
    except BaseException:
        # NCCL waits for the other processes when a group is destroyed, and they may sit in a collective that this
        # process will never enter: leave at once, so that torchrun sees the failure and ends the others.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Wait until every process is here; returns at once for a single process."""
    if not _joined():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def gather_objects(value: Value) -> list[Value]:
    """The values of all processes, by rank, on every process. Every process must call it."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Value) -> Value:
    """Value of the main process, on every process. Every process must call it; the others' values are ignored."""
    if not _joined():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """The main process's values, written into the tensor of every process. Every process must call it."""
    if _joined():
        dist.broadcast(tensor, src=0)
    return tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A copy, because autograd may hand one and the same tensor to another operation too.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor, *, sum_gradients: bool = True) -> Tensor:
    """Rows of all processes joined in rank order; differentiable. Every process must call it with equally many rows.

    Args:
        rows: `[B, ...]`.
        sum_gradients: the gradient of the own rows is the sum of what all processes have computed for them. With
            gradients averaged over the processes, as DistributedDataParallel does, that is the gradient of the mean loss
            over the joined batch. False: only what this process has computed reaches its rows, and where every process
            computes the same loss the result is 1 / processes of that.

    Returns:
        `[B * processes, ...]`; `rows` itself for a single process.
    """
    if not _joined() or dist.get_world_size() == 1:
        return rows
    if sum_gradients and rows.is_floating_point():
        return _GatherRows.apply(rows)  # type: ignore[return-value]
    parts = list(_gathered(rows.detach()).chunk(dist.get_world_size()))
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def _gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
