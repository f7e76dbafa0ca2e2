"""One epoch of training: step, meters, log line; stops at a step's end when asked to, and at a loss that is not finite."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmlfa.datasets import prepare_batch
from cmlfa.training.meters import Meters
from cmlfa.training.precision import StepPrecision
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("IRRA.train")


@dataclass
class Step:
    """What a training step needs beside its batch."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    precision: StepPrecision
    device: torch.device

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train on one batch.

        Returns:
            The scalars of the forward pass (weighted losses, accuracies), and their total as `loss`.
        """
        with self.precision.autocast():
            outputs = self.network(prepare_batch(batch, self.device))
        losses = [value for name, value in outputs.items() if "loss" in name]
        total = torch.stack([value.float() for value in losses]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.precision.backward_and_step(total, self.optimizer)
        return {name: value.detach() for name, value in {**outputs, "loss": total}.items()}


@dataclass
class Epoch:
    """Settings of one epoch, and how far it has come."""

    number: int
    log_period: int
    base_lr: float
    done: int = 0
    """Iterations trained so far; those of an interrupted epoch are loaded again and passed over."""


def train_epoch(
    batches: Iterable[dict[str, Tensor]],
    total: int,
    step: Step,
    meters: Meters,
    epoch: Epoch,
    *,
    passed_over_all: Callable[[], None],
    stop_requested: Callable[[], bool],
    last_good: Callable[[], str],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> bool:
    """Train on the batches of one epoch.

    Args:
        batches: the loader; the first `epoch.done` batches were trained before the run was interrupted.
        total: number of batches, or an upper bound (identity sampler), for the log.
        step: trains on one batch.
        meters: running averages, updated.
        epoch: its number and progress, updated.
        passed_over_all: called after the last batch to pass over, before the next one is loaded.
        stop_requested: asked after every step.
        last_good: names the checkpoint to go back to, for the error message.
        progress: wraps the batches in a progress bar.

    Returns:
        Whether the batches came to their end; False if the run was asked to stop.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    finite = FiniteLoss(step.device)
    passed_over = epoch.done
    started = time.perf_counter()
    samples = 0
    for iteration, batch in enumerate(progress(batches), start=1):
        if iteration <= passed_over:
            if iteration == passed_over:
                passed_over_all()
            continue
        values = step(batch)
        size = len(batch["pids"])
        samples += size
        epoch.done = iteration
        meters.update(values, size)
        finite.update(values["loss"], iteration)
        due = iteration % epoch.log_period == 0
        # On a GPU the test waits for the device, so it is made where the log line or the epoch's end does so anyway.
        if step.device.type == "cpu" or due:
            _require_finite(finite, epoch, last_good)
        if due:
            averages = "".join(f", {name}: {value:.4f}" for name, value in meters.averages().items())
            logger.info(
                "Epoch[%d] Iteration[%d/%d]%s, Base Lr: %.2e", epoch.number, iteration, total, averages, epoch.base_lr
            )
        if stop_requested():
            _require_finite(finite, epoch, last_good)
            return False
    _require_finite(finite, epoch, last_good)
    seconds = time.perf_counter() - started
    logger.info(
        "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s]",
        epoch.number,
        seconds / max(1, epoch.done - passed_over),
        samples / seconds,
    )
    return True


def _require_finite(finite: FiniteLoss, epoch: Epoch, last_good: Callable[[], str]) -> None:
    iteration = finite.first_bad_iteration()
    if iteration:
        raise FloatingPointError(
            f"the loss is not a finite number in epoch {epoch.number}, iteration {iteration} (base learning rate "
            f"{epoch.base_lr:.2e}); {last_good()}; a lower --lr, or --precision fp32 or amp, usually helps"
        )
