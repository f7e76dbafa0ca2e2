"""Learning-rate schedules: the multiplier of every group's rate as a function of the optimizer step."""

from tbps_common.errors import InputError

SCHEDULES = ("linear", "step")


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
