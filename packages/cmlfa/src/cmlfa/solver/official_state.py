"""Optimizer and scheduler state in the layout of the released checkpoints: one group per parameter.

There, the parameter with index i is the i-th of `official_param_order`, and group i holds it alone; the scheduler's
`base_lrs` and `_last_lr` have one entry per parameter. Here there are at most four groups, so both need a permutation
when a checkpoint is written or read. The hyperparameters of a group are those of its parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cmlfa.model.weights import official_param_order
from tbps_common.errors import CheckpointError

# How a step is computed is this process's choice, whatever the process that wrote the file chose.
_KERNEL_CHOICES = ("foreach", "fused", "capturable", "differentiable")
# State of the schedule itself; other attributes differ between versions of torch.
_SCHEDULE_NUMBERS = ("last_epoch", "_step_count")
_PER_GROUP = ("base_lrs", "_last_lr")


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
    """Load what `official_optimizer_state` or the released code wrote.

    Raises:
        CheckpointError: it belongs to another set of parameters, another optimizer, or to flags that group the
            parameters in another way; nothing has changed then.
    """
    parameters = _trained(model)
    names = [name for name in official_param_order(model) if dict(model.named_parameters())[name].requires_grad]
    stored_groups: Sequence[Mapping[str, Any]] = state.get("param_groups", ())
    stored = {index: group for group in stored_groups for index in group["params"]}
    if sorted(stored) != list(range(len(parameters))):
        raise CheckpointError(
            f"The optimizer state of {source} covers {len(stored)} parameters, but this model trains {len(parameters)}: "
            "resume with the --loss_names and model flags of that run."
        )
    _check_state(state["state"], parameters, names, source)

    place_of = {id(p): place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
    settings: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    for index, parameter in enumerate(parameters):
        place = place_of[id(parameter)]
        current = optimizer.param_groups[place]
        wanted = {
            key: stored[index][key]
            for key in current
            if key in stored[index] and key != "params" and key not in _KERNEL_CHOICES
        }
        wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()}
        if settings[place] and settings[place] != wanted:
            raise CheckpointError(
                f"{source} trained {names[index]} with {_difference(settings[place], wanted)} than its group here: "
                "resume with the --lr, --lr_factor, --bias_lr_factor and weight-decay flags of that run."
            )
        settings[place] = wanted

    # torch numbers the parameters group by group; its loader then moves and casts each tensor to its parameter.
    official_index = {id(parameter): index for index, parameter in enumerate(parameters)}
    moments: dict[int, dict[str, Any]] = {}
    groups = []
    number = 0
    for place, group in enumerate(optimizer.param_groups):
        numbers = []
        for parameter in group["params"]:
            entry = state["state"].get(official_index[id(parameter)])
            if entry is not None:
                moments[number] = {key: _as_tensor(key, value) for key, value in entry.items()}
            numbers.append(number)
            number += 1
        groups.append({**{k: v for k, v in group.items() if k != "params"}, **settings[place], "params": numbers})
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


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
    """Load what `official_scheduler_state` or the released code wrote; attributes of other torch versions are ignored.

    The course of the schedule (mode, length, warm-up, ...) stays that of the flags: only where the schedule stands and
    the base learning rates are taken.

    Raises:
        CheckpointError: the state lacks an entry or belongs to another set of parameters; nothing has changed then.
    """
    places = _group_of_each(optimizer, model)
    missing = [key for key in (*_SCHEDULE_NUMBERS, *_PER_GROUP) if key not in state]
    if missing:
        raise CheckpointError(f"The scheduler state of {source} lacks {', '.join(missing)}: give another checkpoint.")
    if any(len(state[key]) != len(places) for key in _PER_GROUP):
        raise CheckpointError(
            f"The scheduler state of {source} covers {len(state['base_lrs'])} parameters, but this model trains "
            f"{len(places)}: resume with the --loss_names and model flags of that run."
        )
    for key in _SCHEDULE_NUMBERS:
        setattr(scheduler, key, int(state[key]))
    first = {place: index for index, place in reversed(list(enumerate(places)))}
    for key in _PER_GROUP:
        setattr(scheduler, key, [float(state[key][first[place]]) for place in range(len(optimizer.param_groups))])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr()):
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


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [key for key in one if one.get(key) != other.get(key)]
    return "another " + ", ".join(keys)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
