"""`last.pth`: everything that a run needs to go on exactly where it was interrupted."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_common.run.distributed import Ranks

logger = logging.getLogger("mra.training")

VERSION = 1


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0
    """Epochs that are trained and evaluated."""
    batch: int = 0
    """Batches trained of the epoch after them."""
    trained: bool = False
    """Whether these are all of its batches, so that only the evaluation is left."""
    steps: int = 0
    """Optimizer steps done, as the schedule counts them."""
    best_r1: float = 0.0
    best_epoch: int = 0
    log: list[str] = field(default_factory=list)
    """Lines of log.txt, one per epoch."""


@dataclass
class Resumed:
    """What `last.pth` held."""

    progress: Progress
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    meters: dict[str, Any]
    """Of this process; used within an epoch only."""
    rng: dict[str, Any] | None
    """Random state of this process, or None if the run had another number of processes."""


def read_state(path: Path, config: Mapping[str, Any], seed: int, ranks: Ranks) -> Resumed:
    """Read `last.pth`.

    Args:
        path: the file.
        config: configuration of this run, with its flags.
        seed: `--seed` of this run.
        ranks: place of this process.

    Raises:
        CheckpointError: the file cannot be read or is no such file, or it lies within an epoch that this run would
            continue with other batches.
    """
    stored = load_checkpoint_file(path)
    try:
        if stored["version"] != VERSION:
            raise CheckpointError(
                f"{path} was written by another version of this program: finish that run with it, or start again"
            )
        progress = Progress(**stored["progress"])
        states, batch_size = stored["rng"], stored["config"]["batch_size_train"]
        own = ranks.rank if len(states) == ranks.world_size else 0
        meters = stored["meters"][own]
        resumed = Resumed(progress, stored["model"], stored["optimizer"], stored["scaler"], meters, states[own])
        before = stored["seed"], batch_size, len(states)
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not the state of a training run ({type(error).__name__}: {error}): name the --output_dir of an "
            "interrupted run"
        ) from error
    now = seed, config["batch_size_train"], ranks.world_size
    if before != now and progress.batch:
        raise CheckpointError(
            f"{path} lies within an epoch of a run with seed {before[0]} and batches of {before[1]} in {before[2]} "
            f"process(es), and this run has seed {now[0]} and batches of {now[1]} in {now[2]}: resume it with the same"
        )
    if len(states) != ranks.world_size:
        resumed.rng = None
        logger.warning(
            "%s holds the random state of %d process(es), and this run has %d: it goes on, but not exactly as it would "
            "have",
            path,
            before[2],
            now[2],
        )
    for key, (old, new) in _changed(stored["config"], config).items():
        logger.warning("%s was %r when the run began, and is %r now", key, old, new)
    where = f", {progress.batch} batches of epoch {progress.epoch}" if progress.batch else ""
    logger.info("resuming from %s: %d epochs done%s", path, progress.epoch, where)
    return resumed


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys([*before, *now])
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}
