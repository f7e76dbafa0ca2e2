"""AdamW with the six parameter groups of the released recipe, and its learning-rate schedules."""

from collections.abc import Mapping
from typing import Any

import torch

from mra.model.network import Retrieval
from tbps_common.errors import InputError

SCHEDULES = ("linear", "step")
BETAS = (0.9, 0.98)
EPSILON = 1e-8

# A parameter whose official name contains one of these is not decayed. So relative-position tables are not ("bias"),
# while the temperature, BatchNorm weights and the ITM head's LayerNorm weight are.
_NO_DECAY = (
    "bias",
    "LayerNorm.bias",
    "LayerNorm.weight",
    "norm.bias",
    "norm.weight",
    "norm1.bias",
    "norm1.weight",
    "norm2.bias",
    "norm2.weight",
)


def param_groups(model: Retrieval, optimizer_cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate (base, `lr_mult`, `lr_x` times the base) and weight decay.

    Groups 0 and 1 hold what is not in `model.init_params`, 2 and 3 what is; 4 and 5 would hold the projections among
    them, which the released lists never name, so they are empty. Even groups are decayed. Tied parameters appear once.

    Args:
        model: the network of `mra.Retrieval`.
        optimizer_cfg: `lr`, `weight_decay`, and `lr_mult`, `lr_x` (1 if absent).

    Returns:
        Six mappings with `params`, `names` (official), `weight_decay` and `lr`.

    Raises:
        InputError: `lr` or `weight_decay` is missing or negative.
    """
    lr, weight_decay = (_not_negative(optimizer_cfg, key) for key in ("lr", "weight_decay"))
    rates = [lr, lr * _not_negative(optimizer_cfg, "lr_mult", 1.0), lr * _not_negative(optimizer_cfg, "lr_x", 1.0)]
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": decay, "lr": rate}
        for rate in rates
        for decay in (weight_decay, 0.0)
    ]
    faster, projections = set(model.init_params), set(model.x_params)
    for name, parameter in model.official_named_parameters():
        if not parameter.requires_grad:
            continue
        place = 0 if name not in faster else 4 if name in projections else 2
        group = groups[place + any(part in name for part in _NO_DECAY)]
        group["params"].append(parameter)
        group["names"].append(name)
    return groups


def create_optimizer(model: Retrieval, optimizer_cfg: Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW over `param_groups`, fused where the parameters allow it. Move the model to its device first."""
    groups = [
        {key: group[key] for key in ("params", "weight_decay", "lr")} for group in param_groups(model, optimizer_cfg)
    ]
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = {parameter.device.type for parameter in parameters} <= {"cuda", "cpu"}
    return torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=BETAS, eps=EPSILON, fused=fused)


def _not_negative(entries: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = entries.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InputError(f"optimizer.{key} must be a number of at least 0, but it is {value!r}.")
    return float(value)


def warmup_steps(num_training_steps: int, num_warmup_steps: int | float) -> int:
    """Steps of warm-up: a whole number as given, a fraction in [0, 1) of the training steps."""
    if isinstance(num_warmup_steps, float):
        if not 0 <= num_warmup_steps < 1 and not num_warmup_steps.is_integer():
            raise InputError(
                f"num_warmup_steps must be a whole number or a fraction below 1, but it is {num_warmup_steps}."
            )
        return int(num_training_steps * num_warmup_steps) if num_warmup_steps < 1 else int(num_warmup_steps)
    return num_warmup_steps


def lr_multiplier(sched: str, step: int, num_training_steps: int, num_warmup_steps: int | float) -> float:
    """Multiplier of the learning rate in optimizer step 0, 1, ...

    `linear` rises from 0 during the warm-up of W steps and falls to 0 at step T. `step` falls likewise, but halved from
    4 W and multiplied by 0.2 from 7 W on.

    Args:
        sched: `linear` or `step`.
        step: optimizer steps done before.
        num_training_steps: T, epochs times steps of an epoch.
        num_warmup_steps: W, or its fraction of T as a float below 1.

    Raises:
        NotImplementedError: another schedule.
    """
    if sched not in SCHEDULES:
        raise NotImplementedError(f"schedular.sched must be one of {', '.join(SCHEDULES)}, but it is {sched!r}.")
    warmup = warmup_steps(num_training_steps, num_warmup_steps)
    if step < warmup:
        return step / max(1, warmup)
    decay = max(0.0, (num_training_steps - step) / max(1, num_training_steps - warmup))
    if sched == "linear" or step < 4 * warmup:
        return decay
    return (0.5 if step < 7 * warmup else 0.2) * decay


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

    def set_rates(self, done: int) -> None:
        """Give the optimizer the rates of the step that comes after `done` steps."""
        factor = lr_multiplier(self._kind, done, self._total, self._warmup)
        for group, base in zip(self._optimizer.param_groups, self._base):
            group["lr"] = base * factor
