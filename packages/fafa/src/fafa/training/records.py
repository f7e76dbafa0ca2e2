"""What a run writes about its progress: tables of losses and validations, and the weights worth keeping."""

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fafa.checkpoint import save_model
from fafa.training.run_directory import BEST_BY_EPOCH, BEST_BY_STEP, LAST, TABLES, WEIGHTS, Table
from fafa.training.state import Progress
from tbps_common.run.distributed import Ranks

logger = logging.getLogger("fafa.train")


class Records:
    """The tables and weights of a run. Every process keeps the rows and the best values; the main one writes files.

    Args:
        directory: run directory.
        progress: its `tables`, `best_step` and `best_epoch` are read and updated.
        model: whose weights are saved.
        args: `save_training`, `save_best` and `save_last` are used.
        ranks: place of this process.
    """

    def __init__(
        self, directory: Path, progress: Progress, model: nn.Module, args: argparse.Namespace, ranks: Ranks
    ) -> None:
        self.directory, self.progress, self.model = directory, progress, model
        self._args, self._ranks = args, ranks
        self._tables = {
            name: Table(directory / file, progress.tables.setdefault(name, [])) for name, file in TABLES.items()
        }

    def rewrite(self) -> None:
        """Write the tables of a resumed run: rows after the state it goes on from disappear."""
        if self._ranks.is_main:
            for table in self._tables.values():
                table.write()

    def add_losses(self, epoch: int, means: Mapping[str, float]) -> None:
        """Note the mean losses of an epoch, once."""
        rows = self._tables["train"].rows
        if not rows or rows[-1]["epoch"] != epoch:
            self._add("train", {"epoch": epoch, **means})

    def add_validation(self, by: Literal["step", "epoch"], number: int, measured: Mapping[str, float]) -> None:
        """Note a validation, and save the weights if no earlier one of its kind had such an R@1.

        Args:
            by: what the validations of this kind count.
            number: the step or epoch, from 0.
            measured: recalls and mAP in percent.
        """
        logger.info("ITCPR validation, %s %d:\n%s", by, number, json.dumps(measured, indent=4))
        self._add(by, {by: number, **measured})
        if measured["recall_at1"] > getattr(self.progress, f"best_{by}"):
            setattr(self.progress, f"best_{by}", measured["recall_at1"])
            if self._args.save_training and self._args.save_best:
                self._save(BEST_BY_STEP if by == "step" else BEST_BY_EPOCH, number, by)

    def save_last(self, epoch: int) -> None:
        """Save the weights at the end of an epoch, if that is asked for."""
        if self._args.save_training and self._args.save_last:
            self._save(LAST, epoch, "epoch")

    def _add(self, name: str, row: dict[str, Any]) -> None:
        self._tables[name].rows.append(row)
        if self._ranks.is_main:
            self._tables[name].write()

    def _save(self, name: str, number: int, mode: Literal["step", "epoch"]) -> None:
        if self._ranks.is_main:
            save_model(name, number, self.model, self.directory, mode=mode)
            logger.info("saved %s", self.directory / WEIGHTS / f"{name}.pt")
