"""Optimizer and schedule of the paper: AdamW on one group, one cycle of cosine annealing."""

import warnings

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from fafa.model.weights import ordered_parameters

WARM_UP_SHARE = 1 / 50


def build_optimizer(model: nn.Module, learning_rate: float) -> AdamW:
    """AdamW with betas (0.9, 0.98), eps 1e-7 and weight decay 0.05 on every trainable parameter, biases included.

    The schedule of `build_scheduler` then drives beta1. Parameters are in the order of the checkpoint layout. On a GPU the
    step is one fused kernel, which a gradient scaler need not wait for. Move the model to its device first.
    """
    parameters = [parameter for parameter in ordered_parameters(model) if parameter.requires_grad]
    fused = all(parameter.device.type == "cuda" for parameter in parameters) or None
    return AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05, fused=fused)


def build_scheduler(
    optimizer: Optimizer, max_lr: float, steps_per_epoch: int, epochs: int, done: int = 0
) -> OneCycleLR:
    """One cycle over `steps_per_epoch * epochs` steps: a fiftieth up from `max_lr / 25`, then down to `max_lr / 250000`.

    Beta1 falls from 0.95 to 0.85 while the rate rises, and back. With exactly 50 steps the rise would take 0 steps, for
    which torch divides by zero; it then is a hair longer.

    Args:
        optimizer: its rate and beta1 are driven.
        max_lr: highest rate.
        steps_per_epoch: batches of an epoch.
        epochs: of the whole run.
        done: steps that were made before; the schedule goes on behind them.
    """
    share = WARM_UP_SHARE
    if share * steps_per_epoch * epochs == 1:
        share += 1e-9
    schedule = OneCycleLR(optimizer, max_lr=max_lr, pct_start=share, steps_per_epoch=steps_per_epoch, epochs=epochs)
    with warnings.catch_warnings(action="ignore"):  # torch misses the optimizer's steps, which are those of `done`
        for _ in range(min(done, steps_per_epoch * epochs)):
            schedule.step()
    return schedule
