"""Averages of a training epoch, kept on the device so that a step never waits for the host."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Meters:
    """Weighted averages of named scalars, in the order in which the names first came; one transfer per reading."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}
        self._latest: dict[str, Tensor | float] = {}

    def update(self, values: Mapping[str, Tensor | float], weight: float = 1) -> None:
        """Add the values of one step.

        Args:
            values: scalars by name. Tensors are summed in float64 where they are; plain numbers (a learning rate) stay on
                the host.
            weight: what the step counts, such as its number of samples.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach()
                added: Tensor | float = value.double() * weight
            else:
                added = value * weight
            self._latest[name] = value
            self._sums[name] = self._sums[name] + added if name in self._sums else added
            self._weights[name] = self._weights.get(name, 0) + weight

    def latest(self) -> dict[str, float]:
        """The values of the last step."""
        return _on_host(self._latest)

    def averages(self) -> dict[str, float]:
        """Averages so far, of this process."""
        return {name: total / self._weights[name] for name, total in _on_host(self._sums).items()}

    def averages_of_all(self, device: torch.device) -> dict[str, float]:
        """Averages over all processes, every one of which must call this with the same names in its meters.

        Args:
            device: where the process group computes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.averages()
        own = [*_on_host(self._sums).values(), *(self._weights[name] for name in self._sums)]
        together = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(together)
        sums, weights = together.view(2, -1).tolist()
        return {name: total / weight for name, total, weight in zip(self._sums, sums, weights)}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, for the state of an unfinished epoch."""
        return {"sums": _on_host(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the numbers of `state_dict`."""
        self._sums = {name: float(total) for name, total in state["sums"].items()}
        self._weights = {name: float(weight) for name, weight in state["weights"].items()}
        self._latest = {}


def _on_host(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as numbers, with one transfer for all tensors."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if tensors:
        numbers = torch.stack([value.double() for value in tensors.values()]).tolist()
        values = {**values, **dict(zip(tensors, numbers))}
    return {name: float(value) for name, value in values.items()}
