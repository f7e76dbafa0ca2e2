"""Optimizer, learning-rate schedule, and their exchange with checkpoints of the released code."""

from cmlfa.model.weights import official_param_order
from cmlfa.solver.official_state import (
    load_official_optimizer_state,
    load_official_scheduler_state,
    official_optimizer_state,
    official_scheduler_state,
)
from cmlfa.solver.optimizer import build_optimizer, parameter_rule
from cmlfa.solver.schedule import EpochSchedule, build_lr_scheduler

__all__ = [
    "EpochSchedule",
    "build_lr_scheduler",
    "build_optimizer",
    "load_official_optimizer_state",
    "load_official_scheduler_state",
    "official_optimizer_state",
    "official_param_order",
    "official_scheduler_state",
    "parameter_rule",
]
