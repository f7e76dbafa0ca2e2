"""The first loss that is not a finite number, found without waiting for the device at every step."""

import torch
from torch import Tensor


class FiniteLoss:
    """Remembers the first step whose loss was NaN or infinite."""

    def __init__(self, device: torch.device):
        self._first = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, loss: Tensor, iteration: int) -> None:
        """Note the scalar loss of iteration 1, 2, ..."""
        bad = ~torch.isfinite(loss) & (self._first == 0)
        self._first = torch.where(bad, iteration, self._first)

    def first_bad_iteration(self) -> int:
        """The iteration, or 0 while all losses are finite; waits for the device."""
        return int(self._first)
