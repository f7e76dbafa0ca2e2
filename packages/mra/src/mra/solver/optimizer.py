"""AdamW with the six parameter groups of the released recipe."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tbps_common.errors import InputError

if TYPE_CHECKING:
    from mra.model import Retrieval

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


def param_groups(model: "Retrieval", optimizer_cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def create_optimizer(model: "Retrieval", optimizer_cfg: Mapping[str, Any]) -> torch.optim.AdamW:
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
