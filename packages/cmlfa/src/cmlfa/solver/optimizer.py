"""The optimizer of the released recipe, with one parameter group per pair of learning rate and weight decay.

The released code makes one group per parameter, 447 at full size; the rule below has at most four different results,
so four groups and a fused kernel do the same update.
"""

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cmlfa.model.weights import official_param_order
from tbps_common.errors import InputError

# The released recipe damps Adam's steps for its float16 parameters with this epsilon.
ADAM_EPSILON = 1e-3
ADAMW_EPSILON = 1e-8


def parameter_rule(name: str, args: Any) -> tuple[float, float]:
    """Learning rate and weight decay of the parameter `name`; later rules win.

    Names with "cross": `lr_factor`. Names with "bias": `bias_lr_factor` instead, and `weight_decay_bias`. Names with
    "classifier" or "mlm_head": `lr_factor` instead. The shared transformer and the prototypes, although randomly
    initialised, get the base rate: that is the recipe.
    """
    lr, weight_decay = args.lr, args.weight_decay
    if "cross" in name:
        lr = args.lr * args.lr_factor
    if "bias" in name:
        lr, weight_decay = args.lr * args.bias_lr_factor, args.weight_decay_bias
    if "classifier" in name or "mlm_head" in name:
        lr = args.lr * args.lr_factor
    return lr, weight_decay


def build_optimizer(args: Any, model: nn.Module) -> Optimizer:
    """The optimizer named by `args.optimizer` (any case) over all trainable parameters of `model`.

    Move the model to its device first. Groups are ordered by their first parameter in the order of the released code,
    so the first group has the base learning rate.

    Raises:
        InputError: an optimizer other than SGD, Adam or AdamW.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name in official_param_order(model):
        if not parameters[name].requires_grad:
            continue
        lr, weight_decay = parameter_rule(name, args)
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameters[name])
    fused = _can_fuse(list(parameters.values()))
    betas = (args.alpha, args.beta)
    match args.optimizer.lower():
        case "sgd":
            return SGD(groups.values(), lr=args.lr, momentum=args.momentum, fused=fused)
        case "adam":
            return Adam(groups.values(), lr=args.lr, betas=betas, eps=ADAM_EPSILON, fused=fused)
        case "adamw":
            return AdamW(groups.values(), lr=args.lr, betas=betas, eps=ADAMW_EPSILON, fused=fused)
    raise InputError(f"--optimizer must be SGD, Adam or AdamW, but it is {args.optimizer!r}.")


def _can_fuse(parameters: list[nn.Parameter]) -> bool | None:
    """Whether the fused kernels serve these parameters; None leaves the choice to torch."""
    on_cuda = all(parameter.device.type == "cuda" for parameter in parameters)
    plain_cpu = all(parameter.device.type == "cpu" and parameter.dtype == torch.float32 for parameter in parameters)
    return True if on_cuda or plain_cpu else None
