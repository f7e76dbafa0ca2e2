"""The parts of a DeepSpeed file that a run without DeepSpeed follows: learning-rate schedule and clipping."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError

_AUTO = "auto"


@dataclass(frozen=True)
class WarmupDecay:
    """DeepSpeed's WarmupDecayLR; `None` stands for "auto", which takes the trainer's flag.

    Attributes:
        warmup_type: `log` or `linear`.
        warmup_steps: optimizer steps of warm-up.
        total_steps: optimizer steps of the whole run.
        max_lr: learning rate at the end of the warm-up.
    """

    warmup_type: str = "log"
    warmup_steps: int | None = None
    total_steps: int | None = None
    max_lr: float | None = None


@dataclass(frozen=True)
class DeepSpeedFile:
    """What the file asks for beside ZeRO; `None`: the trainer's own flags decide."""

    schedule: WarmupDecay | None
    clipping: float | None


def deepspeed_is_installed() -> bool:
    """Whether the package `deepspeed` can be imported."""
    return find_spec("deepspeed") is not None


def read_deepspeed_file(path: str) -> DeepSpeedFile:
    """Read schedule and clipping.

    Raises:
        InputError: the file cannot be read, or asks for a schedule that only DeepSpeed has.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"--deepspeed {path} cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise InputError(f"--deepspeed {path} is not valid JSON ({error}): correct it") from error
    if not isinstance(content, dict):
        raise InputError(f"--deepspeed {path} must hold one JSON object")
    clipping = _number(path, "gradient_clipping", content.get("gradient_clipping", _AUTO))
    return DeepSpeedFile(_schedule(path, content.get("scheduler")), clipping)


def _schedule(path: str, section: Any) -> WarmupDecay | None:
    if section is None:
        return None
    kind = section.get("type") if isinstance(section, dict) else section
    if kind != "WarmupDecayLR":
        raise InputError(
            f"--deepspeed {path} asks for the schedule {kind!r}, which needs DeepSpeed: without it only WarmupDecayLR is "
            'computed here; give --deepspeed "" and --lr_scheduler_type instead'
        )
    params = section.get("params") or {}
    warmup_type = params.get("warmup_type", "log")
    if warmup_type not in ("log", "linear"):
        raise InputError(f"--deepspeed {path}: warmup_type must be log or linear, not {warmup_type!r}")
    if _number(path, "warmup_min_lr", params.get("warmup_min_lr", 0)):
        raise InputError(f"--deepspeed {path}: warmup_min_lr must be 0 without DeepSpeed")
    warmup = _number(path, "warmup_num_steps", params.get("warmup_num_steps", _AUTO))
    total = _number(path, "total_num_steps", params.get("total_num_steps", _AUTO))
    return WarmupDecay(
        warmup_type=warmup_type,
        warmup_steps=None if warmup is None else int(warmup),
        total_steps=None if total is None else int(total),
        max_lr=_number(path, "warmup_max_lr", params.get("warmup_max_lr", _AUTO)),
    )


def _number(path: str, name: str, value: Any) -> float | None:
    if value == _AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise InputError(f'--deepspeed {path}: {name} must be a number of at least 0 or "auto", not {value!r}')
    return value
