"""Checkpoints in the layout of the released code: reading, writing, and the mapping between its names and ours."""

import os
from pathlib import Path
from typing import Literal

from torch import nn

from fafa.model.start_weights import load_checkpoint
from fafa.model.weights import (
    LoadResult,
    StateDictMismatch,
    interpolate_pos_embed,
    load_official_state_dict,
    official_named_parameters,
    official_state_dict,
)
from tbps_common.run.checkpoint import save_checkpoint

__all__ = [
    "LoadResult",
    "StateDictMismatch",
    "interpolate_pos_embed",
    "load_checkpoint",
    "load_official_state_dict",
    "official_named_parameters",
    "official_state_dict",
    "save_model",
]


def save_model(
    name: str,
    iteration: int,
    model: nn.Module,
    training_path: str | os.PathLike[str],
    mode: Literal["epoch", "step"] = "epoch",
) -> Path:
    """Write `training_path/saved_models/<name>.pt` as `{mode: iteration, "model": official state dict}`.

    Args:
        name: file name without `.pt`.
        iteration: epoch or step the weights belong to.
        model: the model, also wrapped in DistributedDataParallel.
        training_path: the run's folder; `saved_models` is created.
        mode: what `iteration` counts.

    Returns:
        The path. The file is written whole or not at all.

    Raises:
        ValueError: an unknown mode.
        OSError: the file cannot be written; an older one of that name is untouched.
    """
    if mode not in ("epoch", "step"):
        raise ValueError(f"mode must be 'epoch' or 'step', got {mode!r}.")
    path = Path(training_path) / "saved_models" / f"{name}.pt"
    save_checkpoint({mode: int(iteration), "model": official_state_dict(model)}, path)
    return path
