"""Tensors of all processes as one batch, gradients included."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every process computed the loss of the whole batch: the gradient of this one's rows is the sum of all.
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def joined() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(own: Tensor) -> Tensor:
    """Rows of all processes in rank order; every process gives as many."""
    return _Gather.apply(own)  # type: ignore[return-value]


def from_main(tensor: Tensor) -> Tensor:
    """The first process's values, on all."""
    dist.broadcast(tensor, src=0)
    return tensor
