"""Optimizer groups and learning-rate schedules."""

from mra.solver.optimizer import create_optimizer, param_groups
from mra.solver.schedule import lr_multiplier

__all__ = ["create_optimizer", "lr_multiplier", "param_groups"]
