"""The learning-rate schedule: warm-up, then one of five courses, stepped once per epoch."""

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tbps_common.errors import InputError

MODES = ("step", "exp", "poly", "cosine", "linear")
WARMUP_METHODS = ("constant", "linear")


class EpochSchedule(LRScheduler):
    """Learning rate of each group as a function of the number e of completed epochs and its base rate b.

    Warm-up (e < `warmup_epochs`): `b * warmup_factor`, or linear from there to b. Afterwards, with
    `r = (e - warmup_epochs) / (total_epochs - warmup_epochs)`:

    * step: `b * gamma ** (number of milestones <= e)`
    * cosine: `target + (b - target) * (1 + cos(pi r)) / 2`
    * linear: `b (1 - r)`
    * exp: `b * power ** r`
    * poly: `target + (b - target) * power ** (1 - r)`, which is what the released code computes

    All attributes are plain numbers, strings and lists, because the released checkpoints store them as they are.

    Raises:
        InputError: an unknown mode or warm-up method, or milestones that are not increasing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int] = (20, 50),
        gamma: float = 0.1,
        mode: str = "cosine",
        warmup_factor: float = 0.1,
        warmup_epochs: int = 5,
        warmup_method: str = "linear",
        total_epochs: int = 60,
        target_lr: float = 0.0,
        power: float = 0.9,
    ):
        if mode not in MODES:
            raise InputError(f"--lrscheduler must be one of {', '.join(MODES)}, but it is {mode!r}.")
        if warmup_method not in WARMUP_METHODS:
            raise InputError(
                f"--warmup_method must be one of {', '.join(WARMUP_METHODS)}, but it is {warmup_method!r}."
            )
        if list(milestones) != sorted(milestones):
            raise InputError(f"--milestones must be increasing epochs, but they are {list(milestones)}.")
        self.milestones = [int(milestone) for milestone in milestones]
        self.gamma = gamma
        self.mode = mode
        self.warmup_factor = warmup_factor
        self.warmup_epochs = warmup_epochs
        self.warmup_method = warmup_method
        self.total_epochs = total_epochs
        self.target_lr = target_lr
        self.power = power
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Learning rate of each group in the coming epoch."""
        return [self._rate(float(base), self.last_epoch) for base in self.base_lrs]

    def _rate(self, base: float, epoch: int) -> float:
        if epoch < self.warmup_epochs:
            if self.warmup_method == "constant":
                return base * self.warmup_factor
            share = epoch / self.warmup_epochs
            return base * (self.warmup_factor * (1 - share) + share)
        if self.mode == "step":
            return base * self.gamma ** sum(milestone <= epoch for milestone in self.milestones)
        length = self.total_epochs - self.warmup_epochs
        # A run that ends with its warm-up is stepped once more after its last epoch.
        r = (epoch - self.warmup_epochs) / length if length > 0 else 1.0
        if self.mode == "cosine":
            return self.target_lr + (base - self.target_lr) * 0.5 * (1 + math.cos(math.pi * r))
        if self.mode == "linear":
            return base * (1 - r)
        if self.mode == "exp":
            return base * self.power**r
        return self.target_lr + (base - self.target_lr) * self.power ** (1 - r)


def build_lr_scheduler(args: Any, optimizer: Optimizer) -> EpochSchedule:
    """The schedule the flags ask for; call `step()` once after each epoch."""
    return EpochSchedule(
        optimizer,
        milestones=args.milestones,
        gamma=args.gamma,
        mode=args.lrscheduler,
        warmup_factor=args.warmup_factor,
        warmup_epochs=args.warmup_epochs,
        warmup_method=args.warmup_method,
        total_epochs=args.num_epoch,
        target_lr=args.target_lr,
        power=args.power,
    )
