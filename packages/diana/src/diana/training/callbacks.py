"""Callbacks of the trainer: checkpoints that are whole or absent, and stopping on a signal."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diana.training.checkpoint_folders import checkpoints, delete
from tbps_common.run.batches import ReplacedItems
from tbps_common.run.distributed import barrier
from tbps_common.run.stop import AgreedStop


class Bar(ProgressCallback):
    """The progress bar alone: log lines are printed by the trainer."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class WholeCheckpoints(TrainerCallback):
    """Moves what the trainer wrote to its place when all of it is on the disk.

    The trainer's own `output_dir` is a folder for what is unfinished, so that a killed run leaves no half checkpoint
    that a later one would go on from.

    Args:
        output_dir: of the run.
        keep: how many checkpoints stay; `None`: all.
        replaced: what an earlier run left; deleted as soon as a checkpoint of this one stands.
    """

    def __init__(self, output_dir: Path, keep: int | None, replaced: list[Path]) -> None:
        self.output_dir, self.keep, self.replaced = output_dir, keep, replaced
        self._saved_at = -1

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        barrier()  # every process has written its part
        self._saved_at = state.global_step
        if state.is_world_process_zero:
            self._install(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        barrier()
        return control

    def _install(self, written: Path) -> None:
        _flush(written)
        target = self.output_dir / written.name
        # Moved away first, deleted last: deleting many gigabytes takes time, and a kill meanwhile would leave nothing.
        aside = Path(tempfile.mkdtemp(prefix="replaced-", dir=written.parent))
        for path in {*self.replaced, target}:
            if path.exists():
                os.rename(path, aside / path.name)
        self.replaced = []
        os.rename(written, target)
        _flush_folder(self.output_dir)
        delete([aside])
        if self.keep:
            delete(checkpoints(self.output_dir)[: -self.keep])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The mean of the logged loss begins anew after a save, so that a resumed run logs the same means.
        control.should_log |= control.should_save
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save &= state.global_step != self._saved_at
        control.should_log |= control.should_save
        return control


class StopOnSignal(TrainerCallback):
    """After a step in which any process was asked to stop, all save and stop."""

    def __init__(self, agreed: AgreedStop) -> None:
        self._agreed = agreed
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._agreed():
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control


class ReportReplaced(TrainerCallback):
    """Says, at the end of an epoch and of the training, which images could not be read.

    Args:
        replaced: keeps count.
        path: of a sample's image.
        say: shows a sentence.
    """

    def __init__(self, replaced: ReplacedItems, path: Callable[[int], str], say: Callable[[str], None]) -> None:
        self._replaced, self._path, self._say = replaced, path, say

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        sentence = self._replaced.report(self._path)
        if sentence is not None:
            self._say(f"warning: {sentence}")

    on_train_end = on_epoch_end


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
