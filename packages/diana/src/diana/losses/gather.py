"""Rows of all processes, differentiably."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Forward: all-gather. Backward: the gradients of all processes for the own rows, summed.

    With gradients averaged over processes, as data-parallel training does, the result is the gradient of the mean loss
    over the joined batch.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A copy, because autograd may hand one and the same tensor to another operation too.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows `[B, ...]` of every process joined in rank order, `[B * R, ...]`; `rows` itself for a single process.

    All processes must hold equally many rows. Gradients flow back to the process that owns a row.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    if not rows.is_floating_point():
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
    return _GatherRows.apply(rows)
