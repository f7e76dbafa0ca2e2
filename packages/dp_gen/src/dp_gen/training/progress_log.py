"""Losses of every update, kept on the device and read back once in a while: a step never waits for the host."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names of the losses of the model, and under which tag the released code logs them.
TAGS = {"loss": "train_loss", "denoise_loss": "denoise_loss", "localization_loss": "localization_loss"}


class ProgressLog:
    """Collects the scalars of updates; `flush` averages them over the processes and hands them to the trackers.

    Args:
        accelerator: its trackers receive one point per update.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self._steps: list[int] = []
        self._rates: list[float] = []
        self._rows: list[Tensor] = []
        self._names: list[str] = []
        self._samples, self._since = 0, time.perf_counter()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, lr: float, samples: int) -> None:
        """Note an update: its number, its mean losses, and the samples it used over all processes."""
        self._names = [name for name in TAGS if name in losses]
        self._rows.append(torch.stack([*(losses[name].detach().float() for name in self._names), grad_norm.float()]))
        self._steps.append(step)
        self._rates.append(lr)
        self._samples += samples

    def flush(self) -> dict[str, float]:
        """Send the noted updates to the trackers; returns the values of the last one (empty if there is none).

        Every process must call it.
        """
        if not self._steps:
            return {}
        rows = self.accelerator.reduce(torch.stack(self._rows), reduction="mean").tolist()
        seconds = time.perf_counter() - self._since
        values: dict[str, float] = {}
        for step, rate, row in zip(self._steps, self._rates, rows):
            values = {TAGS[name]: value for name, value in zip(self._names, row)}
            values |= {"grad_norm": row[-1], "lr": rate}
            if step == self._steps[-1]:
                values["images_per_s"] = self._samples / max(seconds, 1e-9)
            self.accelerator.log(values, step=step)
        self._steps, self._rates, self._rows, self._samples = [], [], [], 0
        self._since = time.perf_counter()
        return values
