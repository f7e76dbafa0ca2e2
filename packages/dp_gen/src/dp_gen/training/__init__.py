"""Training: what is trained and how, the loop, checkpoints and resuming."""

from dp_gen.training.optimizer import build_lr_scheduler, build_optimizer, set_trainable

__all__ = ["build_lr_scheduler", "build_optimizer", "set_trainable"]
