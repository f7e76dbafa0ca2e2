"""One training step: forward under autocast, backward, optimizer, schedule."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mra.solver import lr_multiplier

logger = logging.getLogger("mra.training")

_SKIPPED_IN_A_ROW = 100


class Schedule:
    """Learning rates of all groups, a function of the number of optimizer steps done.

    Args:
        optimizer: its present rates are the base rates.
        settings: `schedular` of the configuration.
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], steps_per_epoch: int):
        self._optimizer = optimizer
        self._base = [float(group["lr"]) for group in optimizer.param_groups]
        self._kind, self._warmup = str(settings["sched"]), settings["num_warmup_steps"]
        self._total = settings["epochs"] * steps_per_epoch
        self.done = 0
        self._apply()

    def step(self) -> None:
        """Go on to the rates of the next step."""
        self.done += 1
        self._apply()

    def go_to(self, done: int) -> None:
        """The rates after `done` steps."""
        self.done = done
        self._apply()

    def _apply(self) -> None:
        factor = lr_multiplier(self._kind, self.done, self._total, self._warmup)
        for group, base in zip(self._optimizer.param_groups, self._base):
            group["lr"] = base * factor


class Step:
    """Trains the network on one batch.

    On a GPU the forward pass runs under bfloat16 autocast, with the released gradient scaler: a step whose gradients are
    not finite is left out, and the schedule does not move. On the CPU everything is float32.

    Args:
        network: the model, or DistributedDataParallel around it.
        optimizer: of `mra.create_optimizer`.
        schedule: its learning rates.
        device: where the model is.
        region: weight of the region loss.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        device: torch.device,
        region: float,
    ):
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.device, self.region = device, region
        self.scaler = torch.amp.GradScaler(device.type) if device.type == "cuda" else None
        self._skipped = 0

    @property
    def meter_names(self) -> list[str]:
        return ["loss_itc", "loss_itm", "loss_mlm", *(["loss_region"] if self.region > 0 else []), "loss"]

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Train on a batch of `training_loader`.

        Returns:
            The four losses (`loss_region` unweighted), and their weighted sum as `loss`.

        Raises:
            FloatingPointError: a hundred steps in a row had gradients that are not finite.
        """
        moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            itc, itm, mlm, region = self.network(**moved)
            loss = itc + itm + mlm
            if self.region > 0:
                loss = loss + self.region * region
        self.optimizer.zero_grad(set_to_none=True)
        self._update(loss)
        return {
            "loss_itc": itc.detach(),
            "loss_itm": itm.detach(),
            "loss_mlm": mlm.detach(),
            **({"loss_region": region.detach()} if self.region > 0 else {}),
            "loss": loss.detach(),
        }

    def _update(self, loss: Tensor) -> None:
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            return
        scale = self.scaler.get_scale()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
            self._skipped = 0
            return
        self._skipped += 1
        logger.warning("a step was left out, because its gradients are not finite (%d in a row)", self._skipped)
        if self._skipped >= _SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients of {self._skipped} steps in a row are not finite: go back to the last good checkpoint with "
                "a lower --lr"
            )
