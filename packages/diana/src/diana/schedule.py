"""Learning rate of the released runs: DeepSpeed's WarmupDecayLR, as a pure function of the step."""

import math

from tbps_common.errors import InputError

WARMUP_TYPES = ("log", "linear")


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
