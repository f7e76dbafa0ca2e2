"""Running means of an epoch, kept on the device so that a training step never waits for the host."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tbps_common.run.distributed import Ranks


class Meters:
    """Means weighted by batch size, in the order of the losses' dict."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def update(self, losses: Mapping[str, Tensor], batch_size: int) -> None:
        """Add the scalars of one step."""
        for name, value in losses.items():
            added = value.detach().double() * batch_size
            self._sums[name] = self._sums[name] + added if name in self._sums else added
        self._samples += batch_size

    def means(self) -> dict[str, float]:
        """Means so far; one transfer from the device for all of them."""
        if not self._samples:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        return {name: total / self._samples for name, total in zip(self._sums, sums)}

    def means_of_all(self, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """Means over all processes; every process must call it."""
        if not ranks.distributed:
            return self.means()
        sums = torch.stack([*self._sums.values(), torch.tensor(float(self._samples), dtype=torch.float64).to(device)])
        dist.all_reduce(sums)
        *totals, samples = sums.tolist()
        return {name: total / samples for name, total in zip(self._sums, totals)}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the state of an unfinished epoch."""
        return {"sums": {name: float(total) for name, total in self._sums.items()}, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from the numbers of `state_dict`."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=device) for name, total in state["sums"].items()
        }
        self._samples = int(state["samples"])
