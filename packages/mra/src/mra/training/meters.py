"""Averages of an epoch, kept on the device so that a training step never waits for the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Meters:
    """Averages over the iterations of an epoch and over all processes.

    Args:
        names: of the losses, in the order of a log line; the learning rate comes before them.
        device: where the losses are.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self._losses = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._latest = torch.zeros(len(self.names), device=device)
        self._rate = self._latest_rate = 0.0
        self._count = 0

    def update(self, losses: Mapping[str, Tensor], rate: float) -> None:
        """Add the scalar losses of one iteration, and the learning rate of the next one."""
        self._latest = torch.stack([losses[name].detach().float() for name in self.names])
        # A step under the gradient scaler whose loss is not finite has been left out.
        self._losses += torch.nan_to_num(self._latest, nan=0.0, posinf=0.0, neginf=0.0)
        self._rate += rate
        self._latest_rate = rate
        self._count += 1

    def latest(self) -> str:
        """The values of the last iteration of this process, for a log line."""
        values = self._latest.tolist()
        parts = [f"lr: {self._latest_rate:.6f}", *(f"{name}: {value:.4f}" for name, value in zip(self.names, values))]
        return "  ".join(parts)

    def averages(self) -> dict[str, float]:
        """Averages over all processes, every one of which must call this; one transfer for all of them."""
        totals = torch.cat([self._losses, self._losses.new_tensor([self._rate, self._count])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        *losses, rate, count = totals.tolist()
        count = max(count, 1)
        return {"lr": rate / count, **{name: total / count for name, total in zip(self.names, losses)}}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint of an unfinished epoch."""
        return {"losses": dict(zip(self.names, self._losses.tolist())), "rate": self._rate, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the numbers of `state_dict`."""
        stored = [float(state["losses"].get(name, 0.0)) for name in self.names]
        self._losses = torch.tensor(stored, dtype=torch.float64, device=self._losses.device)
        self._rate, self._count = float(state["rate"]), int(state["count"])
