"""The state of a run between two steps: what it needs to go on to the bit where it was."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import save_checkpoint
from tbps_common.run.distributed import Ranks, gather_objects
from tbps_common.run.meters import Meters
from tbps_common.run.randomness import rng_state

logger = logging.getLogger(__name__)


class HasState(Protocol):
    """A model, an optimizer, a schedule, a scaler."""

    def state_dict(self) -> Mapping[str, Any]:
        """What `load_state_dict` takes."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Go on from a state."""
        ...


def save_state(
    path: Path, ranks: Ranks, parts: Mapping[str, HasState], *, meters: Meters | None = None, **entries: Any
) -> None:
    """Write the state of a run, whole or not at all; every process must call it, the main one writes.

    The file holds `entries`, the state of every part by its name, and of every process the random state (`rng`) and the
    meters (`meters`).

    Args:
        path: of the file.
        ranks: place of this process.
        parts: by name.
        meters: of this process.
        **entries: plain containers, numbers, strings and tensors.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file is untouched.
    """
    own = rng_state(), meters.state_dict() if meters is not None else {}
    rng, measured = zip(*gather_objects(own))
    if ranks.is_main:
        states = {name: dict(part.state_dict()) for name, part in parts.items()}
        save_checkpoint({**entries, **states, "rng": list(rng), "meters": list(measured)}, path)


def restore_state(
    state: Mapping[str, Any],
    parts: Mapping[str, HasState],
    ranks: Ranks,
    *,
    source: Path,
    meters: Meters | None = None,
) -> dict[str, Any] | None:
    """Load every part and this process's meters from what `save_state` wrote.

    Args:
        state: content of the file.
        parts: by the names they were saved under.
        ranks: place of this process.
        source: the file, for messages.
        meters: of this process; left as they are if the run had another number of processes.

    Returns:
        The random state of this process for `set_rng_state`, which comes last, after everything has been built; None (and
        a warning) if the run had another number of processes.

    Raises:
        CheckpointError: an entry is missing or does not fit its part.
    """
    name = ""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        name = "rng"
        states = list(state["rng"])
        if len(states) == ranks.world_size:
            name = "meters"
            if meters is not None and state["meters"][ranks.rank]:
                meters.load_state_dict(state["meters"][ranks.rank])
            return states[ranks.rank]
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source} does not fit this run (entry {name}: {first}): resume with the flags and the version of this "
            "program that the run was started with"
        ) from error
    logger.warning(
        "%s holds the random state of %d process(es), and this run has %d: it continues, but not exactly as it would have",
        source,
        len(states),
        ranks.world_size,
    )
    return None


def require_finite_weights(model: nn.Module, sentence: str) -> None:
    """Keep weights that are no numbers out of a file.

    Raises:
        FloatingPointError: `sentence`, with the name of the first such parameter or buffer.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(
                f"the weights are no longer finite numbers ({name}), so they are not saved; {sentence}"
            )
