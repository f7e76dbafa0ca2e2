"""Where the losses of a training go: to the log and to accelerate's trackers, TensorBoard by default."""

import importlib.util
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from tbps_common.run.stop import FiniteLoss

PROJECT = "DiversePerson"
# Names of the model's losses, and the tags under which the released code logs them.
TAGS = {"loss": "train_loss", "denoise_loss": "denoise_loss", "localization_loss": "localization_loss"}

logger = logging.getLogger(__name__)


def trackers(report_to: str | None) -> list[Any] | None:
    """Trackers of `--report_to`; by default TensorBoard where it is installed."""
    if report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else None
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    return None if names == ["none"] or not names else names


class LossHistory:
    """The losses of updates, kept on the device and read back once in a while: an update never waits for the host.

    Args:
        accelerator: its trackers receive one point per update.
        finite: is asked before anything is shown.
    """

    def __init__(self, accelerator: Accelerator, finite: FiniteLoss):
        self.accelerator, self.finite = accelerator, finite
        self._updates: list[tuple[int, float]] = []
        self._rows: list[Tensor] = []
        self._names: list[str] = []
        self._samples, self._since = 0, time.perf_counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, lr: float, samples: int) -> None:
        """Note an update: its number, its mean losses, and the samples it used on this process."""
        self._names = [name for name in TAGS if name in losses]
        self._rows.append(torch.stack([*(losses[name].detach().float() for name in self._names), grad_norm.float()]))
        self._updates.append((step, lr))
        self._samples += samples * self.accelerator.num_processes

    def report(self, bar: "tqdm[Any]") -> None:
        """Send the noted updates, averaged over the processes, to the trackers, and show the last one.

        Every process must call it.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        self.finite.require()
        if not self._rows:
            return
        rows = self.accelerator.reduce(torch.stack(self._rows), reduction="mean").tolist()  # type: ignore[union-attr]
        rate = self._samples / max(time.perf_counter() - self._since, 1e-9)
        values: dict[str, float] = {}
        for (step, lr), row in zip(self._updates, rows):
            values = {TAGS[name]: value for name, value in zip(self._names, row)} | {"grad_norm": row[-1], "lr": lr}
            if step == self._updates[-1][0]:
                values["images_per_s"] = rate
            self.accelerator.log(values, step=step)
        shown = {"l_noise": "denoise_loss", "lr": "lr", "l_loc": "localization_loss"}
        bar.set_postfix({short: values.get(name, 0.0) for short, name in shown.items()}, refresh=False)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d/%d: %s", self._updates[-1][0], bar.total, text)
        self._updates, self._rows, self._samples, self._since = [], [], 0, time.perf_counter()
