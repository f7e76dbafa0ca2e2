"""How far a run has come: what `last.pth` holds beyond the released layout, and how it is read back."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbps_common.errors import CheckpointError
from tbps_common.run.distributed import Ranks

logger = logging.getLogger("IRRA.train")


@dataclass
class UnfinishedEpoch:
    """An epoch that was interrupted between two steps."""

    iteration: int
    """Batches trained."""
    trained: bool
    """Whether these are all of the epoch's batches: the run was stopped during the evaluation that follows."""
    epoch_rng: list[dict[str, Any]]
    """Random state of every process at the epoch's start, which decides the order of its batches."""
    meters: Mapping[str, Any]


@dataclass
class Progress:
    """What a run counts beside its weights."""

    epoch: int = 0
    """Completed epochs."""
    best_top1: float = 0.0
    best_epoch: int = 0
    unfinished: UnfinishedEpoch | None = None


def read_progress(entries: Mapping[str, Any], source: Path, ranks: Ranks) -> tuple[Progress, dict[str, Any] | None]:
    """Progress and this process's random state from the entries of a checkpoint beside its weights.

    A file of the released code stores neither the best R1 nor random states: the best R1 then counts from 0, the random
    state is None, and both are logged.

    Raises:
        CheckpointError: the file lies within an epoch, and cannot be continued there.
    """
    try:
        epoch, iteration = int(entries.get("epoch", 0)), int(entries.get("iteration", 0))
        progress = Progress(
            epoch=epoch - 1 if iteration else epoch,
            best_top1=float(entries.get("best_top1") or 0.0),
            best_epoch=int(entries.get("best_epoch") or 0),
        )
        states = entries.get("rng") or []
        processes = len(states)
        if iteration:
            progress.unfinished = UnfinishedEpoch(
                iteration, bool(entries["trained"]), entries["epoch_rng"], entries["meters"]
            )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be resumed: its entry for the progress of the run is damaged ({error}); name another "
            "checkpoint with --resume_ckpt_file"
        ) from error
    if "best_top1" not in entries:
        logger.warning("%s stores no best R1 (the released code does not): counting from 0", source)
    where = f", after iteration {iteration}" if iteration else " done"
    logger.info("resuming from %s: epoch %d%s, best R1 %s", source, epoch, where, progress.best_top1)
    if processes == ranks.world_size:
        return progress, states[ranks.rank]
    if iteration:
        raise CheckpointError(
            f"{source} was written within an epoch by {processes} processes, and this run has {ranks.world_size}: "
            f"resume it with {processes} processes"
        )
    logger.warning(
        "%s holds the random state of %d processes, and this run has %d: it goes on, but not exactly as it would have",
        source,
        processes,
        ranks.world_size,
    )
    return progress, None
