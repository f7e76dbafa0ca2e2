"""Checkpoint folders in accelerate's layout: written whole or not at all, found again, and pruned.

output_dir/checkpoint-<update>/
  model.safetensors  optimizer.bin  scheduler.bin  [scaler.pt]  random_states_<rank>.pkl  progress.json
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp_gen.model.weights import STATE_FILES, write_errors
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file

WEIGHTS = STATE_FILES[0]
OPTIMIZER, SCHEDULER, SCALER, PROGRESS = "optimizer.bin", "scheduler.bin", "scaler.pt", "progress.json"

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer updates.
        epoch: epochs completed.
        batch: batches used of the present epoch, on every process.
        seed: that decides the order of the data.
        samples_per_batch: samples of one batch over all processes.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seed: int = 0
    samples_per_batch: int = 0


def checkpoint_name(step: int) -> str:
    """Name of the folder after `step` updates."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The update a folder's name tells, or None if it is no checkpoint's name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that `--resume_from_checkpoint` asks for; None to start anew.

    `latest` is the complete folder of the largest update in `--output_dir`. Anything else is a path, or the name of a
    folder in `--output_dir`.

    Raises:
        CheckpointError: the named folder is absent or incomplete.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    output_dir = Path(args.output_dir)
    if wanted == "latest":
        complete = [path for path in _checkpoints(output_dir) if _is_complete(path)]
        if not complete:
            logger.info("there is no checkpoint in %s to resume from: starting a new training", output_dir)
        return max(complete, key=lambda path: step_of(path) or 0, default=None)
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / Path(wanted).name
    if not path.is_dir():
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted} is neither a folder nor one in {output_dir}: name an existing "
            "checkpoint, or 'latest'"
        )
    if not _is_complete(path):
        raise CheckpointError(
            f"--resume_from_checkpoint {path} is not complete (weights, {OPTIMIZER}, {SCHEDULER}): name another one, or "
            "'latest'; its weights alone start a new training with --load_model"
        )
    return path


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if path.is_dir() and step_of(path) is not None]


def _is_complete(folder: Path) -> bool:
    weights = any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in STATE_FILES)
    return weights and (folder / OPTIMIZER).is_file() and (folder / SCHEDULER).is_file()


@contextmanager
def new_folder(target: Path, *, is_main: bool, wait: Any) -> Iterator[Path]:
    """Yield a temporary folder; at the end it takes the place of `target`, flushed to disk.

    Args:
        target: final path; a folder of that name is replaced.
        is_main: whether this process prepares and renames it.
        wait: called by every process: returns when all are there.

    Raises:
        OSError: it cannot be written; nothing is left behind, an earlier folder stays.
    """
    partial = target.with_name(f"{target.name}.tmp")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    try:
        with write_errors(target):
            yield partial
        wait()
        if is_main:
            for file in partial.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        wait()
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partial(output_dir: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(output_dir: Path, keep: int, interval: int | None) -> None:
    """Delete all checkpoints but that of update `keep` and those of every `interval`-th update."""
    for folder in _checkpoints(output_dir):
        step = step_of(folder)
        if step != keep and not (interval and step is not None and step % interval == 0):
            shutil.rmtree(folder, ignore_errors=True)


def read_progress(folder: Path, updates_per_epoch: int, accumulation: int) -> Progress:
    """Progress stored in a checkpoint; for one without (the authors' code wrote it) what its name tells.

    Raises:
        CheckpointError: neither tells it.
    """
    path = folder / PROGRESS
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return Progress(**{name: int(stored[name]) for name in asdict(Progress())})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): resume from another checkpoint") from error
    step = step_of(folder)
    if step is None:
        raise CheckpointError(
            f"{folder} has no {PROGRESS}, and its name does not tell its update: rename it to checkpoint-<update>"
        )
    epoch, update = divmod(step, updates_per_epoch)
    return Progress(step=step, epoch=epoch, batch=update * accumulation)


def restore_random_state(folder: Path, rank: int) -> None:
    """Continue the random numbers of this process; a file that is missing or of another machine is only reported."""
    path = folder / f"random_states_{rank}.pkl"
    try:
        states = load_checkpoint_file(path)
        version, words, gauss = states["random_state"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = states["numpy_random_seed"]
        np.random.set_state((name, np.asarray(keys), *rest))
        torch.set_rng_state(states["torch_manual_seed"])
        cuda = states.get("torch_cuda_manual_seed")
        if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
        logger.warning(
            "the random numbers of process %d cannot go on exactly as they were (%s); the training goes on with others",
            rank,
            error,
        )
