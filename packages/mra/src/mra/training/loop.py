"""One epoch of training: log lines, periodic saving, stopping at a step's end when asked to."""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mra.training.meters import Meters
from mra.training.step import Step
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("mra.training")


@dataclass
class Epoch:
    """An epoch, and how far it has come."""

    number: int
    """Counted from 0."""
    batches: int
    done: int = 0
    """Batches trained so far."""


def train_epoch(
    loader: Iterable[Mapping[str, Tensor]],
    step: Step,
    meters: Meters,
    epoch: Epoch,
    *,
    log_every: int,
    save_every: int,
    save: Callable[[], None],
    stop_requested: Callable[[], bool],
    last_good: Callable[[], str],
) -> bool:
    """Train on the rest of an epoch.

    Args:
        loader: the batches that are left.
        step: trains on one.
        meters: updated.
        epoch: updated.
        log_every: iterations between two log lines.
        save_every: iterations between two calls of `save`; 0: never.
        save: called between two steps, on every process at the same one.
        stop_requested: asked after every step; the same answer on every process.
        last_good: names the checkpoint to go back to, for the error message.

    Returns:
        Whether the epoch came to its end; False if the run was asked to stop.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    logger.info("Train Epoch: [%d]", epoch.number)
    clock = _Clock(step.device)
    finite = FiniteLoss(step.device)
    for batch in loader:
        clock.loaded()
        losses = step(batch)
        meters.update(losses, step.optimizer.param_groups[0]["lr"])
        iteration, epoch.done = epoch.done, epoch.done + 1
        last = epoch.done == epoch.batches
        due = iteration % log_every == 0 or last
        if step.scaler is None:  # with a scaler, a step that is not finite has been left out
            finite.update(losses["loss"], epoch.done)
            _require_finite(finite, epoch, last_good)
        clock.stepped()
        if due:
            width = len(str(epoch.batches))
            logger.info(
                "Train Epoch: [%d]  [%*d/%d]  eta: %s  %s  %s",
                epoch.number,
                width,
                iteration,
                epoch.batches,
                clock.eta(epoch.batches - epoch.done),
                meters.latest(),
                clock.summary(),
            )
        if stop_requested():
            return False
        if save_every and epoch.done % save_every == 0 and not last:
            save()
            clock.restart()
    logger.info("Train Epoch: [%d] Total time: %s", epoch.number, clock.total())
    return True


def _require_finite(finite: FiniteLoss, epoch: Epoch, last_good: Callable[[], str]) -> None:
    iteration = finite.first_bad_iteration()
    if iteration:
        raise FloatingPointError(
            f"the loss is not a finite number in epoch {epoch.number}, iteration {iteration - 1}; {last_good()}; a lower "
            "--lr usually helps"
        )


class _Clock:
    """Time of loading and of whole iterations, averaged over those since the start."""

    def __init__(self, device: torch.device):
        self._device = device
        self._start = self._mark = time.perf_counter()
        self._loading = self._stepping = self._waited = 0.0
        self._count = 0

    def loaded(self) -> None:
        self._waited = time.perf_counter() - self._mark

    def stepped(self) -> None:
        now = time.perf_counter()
        self._loading += self._waited
        self._stepping += now - self._mark
        self._count += 1
        self._mark = now

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._mark = time.perf_counter()

    def eta(self, left: int) -> str:
        return str(datetime.timedelta(seconds=int(left * self._stepping / max(1, self._count))))

    def total(self) -> str:
        return str(datetime.timedelta(seconds=int(time.perf_counter() - self._start)))

    def summary(self) -> str:
        count = max(1, self._count)
        text = f"time: {self._stepping / count:.4f}  data: {self._loading / count:.4f}"
        if self._device.type == "cuda":
            text += f"  max mem: {torch.cuda.max_memory_allocated(self._device) / 2**20:.0f}"
        return text
