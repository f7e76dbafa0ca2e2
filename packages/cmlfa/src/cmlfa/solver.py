"""The optimizer, the learning-rate schedule, and their states in the layout of the released checkpoints.

The released code makes one parameter group per parameter, 447 at full size. Its rule has at most four different results,
so here four groups and a fused kernel do the same update, and states are permuted when a checkpoint is written or read.
There, the parameter with index i is the i-th of `official_param_order`, and group i holds it alone; the scheduler's
`base_lrs` and `_last_lr` have one entry per parameter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cmlfa.model import official_param_order
from cmlfa.options import Options
from tbps_common.errors import CheckpointError, InputError

# The released recipe damps Adam's steps for its float16 parameters with this epsilon.
ADAM_EPSILON = 1e-3
ADAMW_EPSILON = 1e-8

# State of the schedule itself; other attributes differ between versions of torch.
_SCHEDULE_NUMBERS = ("last_epoch", "_step_count")
_PER_GROUP = ("base_lrs", "_last_lr")


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
    """The optimizer named by `args.optimizer` over all trainable parameters of `model`.

    Move the model to its device first. Groups are ordered by their first parameter in the order of the released code,
    so the first group has the base learning rate.

    Raises:
        InputError: a flag that is not allowed, such as another optimizer than SGD, Adam or AdamW.
    """
    options = Options.of(args)
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name in official_param_order(model):
        if not parameters[name].requires_grad:
            continue
        lr, weight_decay = parameter_rule(name, options)
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameters[name])
    fused = _can_fuse(list(parameters.values()))
    betas = (options.alpha, options.beta)
    match options.optimizer.lower():
        case "sgd":
            return SGD(groups.values(), lr=options.lr, momentum=options.momentum, fused=fused)
        case "adamw":
            return AdamW(groups.values(), lr=options.lr, betas=betas, eps=ADAMW_EPSILON, fused=fused)
        case _:
            return Adam(groups.values(), lr=options.lr, betas=betas, eps=ADAM_EPSILON, fused=fused)


def _can_fuse(parameters: list[nn.Parameter]) -> bool | None:
    """Whether the fused kernels serve these parameters; None leaves the choice to torch."""
    on_cuda = all(parameter.device.type == "cuda" for parameter in parameters)
    plain_cpu = all(parameter.device.type == "cpu" and parameter.dtype == torch.float32 for parameter in parameters)
    return True if on_cuda or plain_cpu else None


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
        InputError: milestones that are not increasing.
    """

    def __init__(self, optimizer: Optimizer, options: Options):
        if list(options.milestones) != sorted(options.milestones):
            raise InputError(f"--milestones must be increasing epochs, but they are {list(options.milestones)}.")
        self.milestones = list(options.milestones)
        self.gamma = options.gamma
        self.mode = options.lrscheduler
        self.warmup_factor = options.warmup_factor
        self.warmup_epochs = options.warmup_epochs
        self.warmup_method = options.warmup_method
        self.total_epochs = options.num_epoch
        self.target_lr = options.target_lr
        self.power = options.power
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
        # The schedule is stepped after the last epoch too, which may be the last one of the warm-up.
        r = (epoch - self.warmup_epochs) / length if length > 0 else 1.0
        if self.mode == "cosine":
            return self.target_lr + (base - self.target_lr) * 0.5 * (1 + math.cos(math.pi * r))
        if self.mode == "linear":
            return base * (1 - r)
        if self.mode == "exp":
            return base * self.power**r
        return self.target_lr + (base - self.target_lr) * self.power ** (1 - r)


def build_lr_scheduler(args: Any, optimizer: Optimizer) -> EpochSchedule:
    """The schedule the flags ask for; call `step()` once after each epoch.

    Raises:
        InputError: a flag that is not allowed, such as an unknown schedule or warm-up method.
    """
    return EpochSchedule(optimizer, Options.of(args))


def official_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` as the released code would have written it."""
    places = _group_of_each(optimizer, model)
    parameters = _trained(model)
    groups = []
    for index, place in enumerate(places):
        settings = {key: value for key, value in optimizer.param_groups[place].items() if key != "params"}
        settings.update({key: None for key in ("foreach", "fused") if key in settings})
        groups.append({**settings, "params": [index]})
    state = {i: dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state}
    return {"state": state, "param_groups": groups}


def load_official_optimizer_state(
    optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any], source: str
) -> None:
    """Load the moments that `official_optimizer_state` or the released code wrote.

    Learning rates, weight decays and all other settings stay those of the flags.

    Raises:
        CheckpointError: it belongs to another set of parameters or another optimizer; nothing has changed then.
    """
    parameters = _trained(model)
    names = [name for name in official_param_order(model) if dict(model.named_parameters())[name].requires_grad]
    groups: Sequence[Mapping[str, Any]] = state.get("param_groups", ())
    stored = sorted(index for group in groups for index in group["params"])
    if stored != list(range(len(parameters))):
        raise CheckpointError(
            f"The optimizer state of {source} covers {len(stored)} parameters, but this model trains {len(parameters)}: "
            "resume with the --loss_names and model flags of that run."
        )
    if ("betas" in groups[0]) != ("betas" in optimizer.param_groups[0]):
        raise CheckpointError(
            f"The optimizer state of {source} is not one of {type(optimizer).__name__}: resume with the --optimizer of "
            "that run."
        )
    _check_state(state["state"], parameters, names, source)

    # torch numbers the parameters group by group; its loader then moves and casts each tensor to its parameter.
    official_index = {id(parameter): index for index, parameter in enumerate(parameters)}
    moments: dict[int, dict[str, Any]] = {}
    here = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(here):
        entry = state["state"].get(official_index[id(parameter)])
        if entry is not None:
            moments[number] = {key: _as_tensor(key, value) for key, value in entry.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def official_scheduler_state(scheduler: LRScheduler, optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The schedule's plain attributes, with one base and one last learning rate per parameter."""
    state = {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}
    places = _group_of_each(optimizer, model)
    for key in _PER_GROUP:
        rates = getattr(scheduler, key)
        state[key] = [float(rates[place]) for place in places]
    return state


def load_official_scheduler_state(
    scheduler: LRScheduler, optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any], source: str
) -> None:
    """Continue where a schedule of `official_scheduler_state` or of the released code stood.

    Only the number of completed epochs is taken: base rates and course (mode, length, warm-up, ...) are those of the
    flags, so a run that is resumed with other flags trains its remaining epochs as a fresh run with these flags would.

    Raises:
        CheckpointError: the state lacks an entry or belongs to another set of parameters; nothing has changed then.
    """
    trained = len(_trained(model))
    missing = [key for key in (*_SCHEDULE_NUMBERS, *_PER_GROUP) if key not in state]
    if missing:
        raise CheckpointError(
            f"The scheduler state of {source} is missing {', '.join(missing)}: give another checkpoint."
        )
    if any(len(state[key]) != trained for key in _PER_GROUP):
        raise CheckpointError(
            f"The scheduler state of {source} covers {len(state['base_lrs'])} parameters, but this model trains "
            f"{trained}: resume with the --loss_names and model flags of that run."
        )
    for key in _SCHEDULE_NUMBERS:
        setattr(scheduler, key, int(state[key]))
    rates = scheduler.get_lr()
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters in official order."""
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in official_param_order(model) if parameters[name].requires_grad]


def _group_of_each(optimizer: Optimizer, model: nn.Module) -> list[int]:
    """The optimizer's group of each trainable parameter, in official order."""
    place_of = {id(p): place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return [place_of[id(parameter)] for parameter in _trained(model)]


def _check_state(
    state: Mapping[int, Mapping[str, Any]], parameters: list[nn.Parameter], names: list[str], source: str
) -> None:
    for index, entry in state.items():
        for key, value in entry.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameters[index].shape:
                raise CheckpointError(
                    f"The optimizer state {key} of {names[index]} in {source} has shape {list(value.shape)} instead of "
                    f"{list(parameters[index].shape)}: resume with the model flags of that run."
                )


def _as_tensor(key: str, value: Any) -> Any:
    # Older versions of torch counted steps in a Python int.
    return torch.tensor(float(value)) if key == "step" and not torch.is_tensor(value) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
