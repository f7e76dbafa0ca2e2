"""Checkpoints of a training run, in the layout of the released code."""

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cmlfa.model import load_checkpoint
from cmlfa.solver import (
    load_official_optimizer_state,
    load_official_scheduler_state,
    official_optimizer_state,
    official_scheduler_state,
)
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import save_checkpoint


class Checkpointer:
    """Saves and loads the model with its optimizer and schedule.

    Files hold `model`, `optimizer`, `scheduler` as the released code writes them (one optimizer group per parameter in
    its order), beside whatever else is passed to `save`. They are written whole or not at all.

    Args:
        model: the network; wrapped in DistributedDataParallel, what it wraps is saved and loaded.
        optimizer: optimizer of `build_optimizer`, if it is to be saved and resumed.
        scheduler: schedule of `build_lr_scheduler`, likewise; needs `optimizer`.
        save_dir: folder of the files; empty: nothing is ever written.
        save_to_disk: False for the processes that must not write; None counts as True.
        logger: where to say what was written and read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        save_dir: str | os.PathLike[str] = "",
        save_to_disk: bool | None = None,
        logger: logging.Logger | None = None,
    ):
        wrapped = getattr(model, "module", None)
        self.model = wrapped if isinstance(wrapped, nn.Module) else model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.save_dir = os.fspath(save_dir)
        self.save_to_disk = save_to_disk is not False
        self.logger = logger or logging.getLogger("cmlfa.checkpoint")

    def save(self, name: str, **extra: Any) -> None:
        """Write `<save_dir>/<name>.pth` with the entries of `extra` beside the states.

        Raises:
            OSError: the file cannot be written; an older one of that name is untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content: dict[str, Any] = {"model": self.model.state_dict()}
        if self.optimizer is not None:
            content["optimizer"] = official_optimizer_state(self.optimizer, self.model)
            if self.scheduler is not None:
                content["scheduler"] = official_scheduler_state(self.scheduler, self.optimizer, self.model)
        path = Path(self.save_dir) / f"{name}.pth"
        save_checkpoint({**content, **extra}, path)
        self.logger.info("Saved checkpoint %s", path)

    def load(self, path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
        """Load the model alone, strictly; return the remaining entries of the file.

        Raises:
            CheckpointError: the file is missing, cannot be read, or does not fit.
        """
        self.logger.info("Loading checkpoint %s", path)
        return load_checkpoint(self.model, path, trust=trust)

    def resume(self, path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
        """Load the model strictly, and the optimizer and the schedule where the file holds them.

        Returns:
            The remaining entries of the file (`epoch`, ...).

        Raises:
            CheckpointError: the file is missing, cannot be read, or does not fit.
        """
        remaining = self.load(path, trust=trust)
        source = os.fspath(path)
        for name, wanted in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if wanted is not None and name not in remaining:
                self.logger.warning("%s holds no %s state: it starts from scratch", source, name)
        optimizer_state = remaining.pop("optimizer", None)
        scheduler_state = remaining.pop("scheduler", None)
        try:
            if self.optimizer is not None and optimizer_state is not None:
                load_official_optimizer_state(self.optimizer, self.model, optimizer_state, source)
            if self.scheduler is not None and self.optimizer is not None and scheduler_state is not None:
                load_official_scheduler_state(self.scheduler, self.optimizer, self.model, scheduler_state, source)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"The optimizer or scheduler state of {source} is not in the layout of a CMLFA checkpoint "
                f"({type(error).__name__}: {error}): resume from a file that training wrote."
            ) from error
        return remaining
