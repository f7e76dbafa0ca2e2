"""Learning rate of the released runs: DeepSpeed's WarmupDecayLR as a pure function of the step, and the file that asks
for it."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diana.trainer_flags import take_flag
from tbps_common.errors import InputError
from tbps_common.run.distributed import Ranks

WARMUP_TYPES = ("log", "linear")
_AUTO = "auto"


def warmup_decay_gamma(i: int, total_num_steps: int, warmup_num_steps: int, warmup_type: str = "log") -> float:
    """Factor on the learning rate at scheduler step i.

    With `W = max(2, warmup_num_steps)` it rises as `ln(i + 1) / ln W` (`log`) or `i / W` (`linear`) for i < W, then
    falls linearly to 0 at `total_num_steps`. Optimizer step k >= 2 uses factor k - 2, and the first step 0.

    Args:
        i: scheduler step, from 0.
        total_num_steps: optimizer steps of the whole run.
        warmup_num_steps: of the rise.
        warmup_type: `log` or `linear`.

    Raises:
        InputError: an unknown type.
    """
    if warmup_type not in WARMUP_TYPES:
        raise InputError(f"warmup_type must be {' or '.join(WARMUP_TYPES)}, but it is {warmup_type!r}.")
    warmup = max(2, warmup_num_steps)
    if i < warmup:
        return math.log(i + 1) / math.log(warmup) if warmup_type == "log" else i / warmup
    return max(0.0, (total_num_steps - i) / max(1, total_num_steps - warmup))


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

    def factor(self, total_steps: int, warmup_steps: int, learning_rate: float) -> Callable[[int], float]:
        """Steps done -> factor on the learning rate of the next one; the arguments are the trainer's flags."""
        total = total_steps if self.total_steps is None else self.total_steps
        warmup = warmup_steps if self.warmup_steps is None else self.warmup_steps
        peak = 1.0 if self.max_lr is None else self.max_lr / learning_rate

        def gamma(steps_done: int) -> float:
            # The first step has the minimum learning rate; step k >= 2 has that of the schedule's counter k - 2.
            return peak * warmup_decay_gamma(steps_done - 1, total, warmup, self.warmup_type) if steps_done else 0.0

        return gamma


@dataclass(frozen=True)
class DeepSpeedFile:
    """What a DeepSpeed file asks for besides ZeRO; `None`: the trainer's own flags decide."""

    schedule: WarmupDecay | None = None
    clipping: float | None = None


def follow_deepspeed_file(words: list[str], ranks: Ranks, *, cpu: bool) -> tuple[list[str], DeepSpeedFile, bool]:
    """What becomes of `--deepspeed FILE`.

    Args:
        words: flags of the trainer.
        ranks: place of this process.
        cpu: whether the run computes on the CPU.

    Returns:
        Words for the trainer, what is followed of the file without DeepSpeed, and whether DeepSpeed is used.
    """
    words, path = take_flag(words, "deepspeed")
    if not path:
        return words, DeepSpeedFile(), False
    # DeepSpeed itself computes on a CPU where its variable says so.
    placed = not cpu or os.environ.get("DS_ACCELERATOR") == "cpu"
    if placed and ranks.distributed and find_spec("deepspeed") is not None:
        return [*words, "--deepspeed", path], DeepSpeedFile(), True
    if ranks.is_main:
        reason = "one process" if not ranks.distributed else "no GPU" if cpu else "DeepSpeed is not installed"
        print(f"{reason}: schedule and clipping of {path} are computed without DeepSpeed, weights are not partitioned")
    return words, read_deepspeed_file(path), False


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
    if warmup_type not in WARMUP_TYPES:
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
