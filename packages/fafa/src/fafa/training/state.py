"""The state of a run between two steps: what `--resume` needs to go on to the bit where the run was.

`training_state/last.pt` holds everything that changes; `training_state/frozen.pt` holds a frozen ViT, which is written
once. Neither the start weights nor their downloads are needed to resume.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fafa.training.run_directory import STATE
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file, load_state_dict_strictly, save_checkpoint

FORMAT = "fafa-state/1"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the current epoch, from 0.
        batch: batches of it that are trained.
        pending: a validation that is due before the next step: `step`, `epoch`, or empty.
        best_step: best R@1 of the validations by step.
        best_epoch: best R@1 of the validations by epoch.
        tables: rows of the CSV files by name.
    """

    epoch: int = 0
    batch: int = 0
    pending: str = ""
    best_step: float = 0.0
    best_epoch: float = 0.0
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunIdentity:
    """What must not change when a run goes on, because the order of the data or the schedule follows from it."""

    seed: int
    items: int
    batch_size: int
    num_epochs: int
    processes: int


_FLAG = {
    "seed": "--seed",
    "items": "the number of triplets",
    "batch_size": "--batch-size",
    "num_epochs": "--num-epochs",
    "processes": "the number of processes",
}


@dataclass
class SavedState:
    """Content of a state file, checked for its form."""

    path: Path
    identity: RunIdentity
    progress: Progress
    rng: list[dict[str, Any]]
    meters: list[dict[str, Any]]
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]

    def require(self, identity: RunIdentity) -> None:
        """Refuse to go on under other circumstances.

        Raises:
            CheckpointError: names what changed and how.
        """
        for name, before in asdict(self.identity).items():
            now = getattr(identity, name)
            if now != before:
                raise CheckpointError(
                    f"{self.path} belongs to a run with {_FLAG[name]} {before}, and now it is {now}: resume with "
                    f"{before}, or start a new run from its weights with --resume-path"
                )


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def save_state(
    directory: Path,
    model: nn.Module,
    *,
    identity: RunIdentity,
    progress: Progress,
    rng: list[dict[str, Any]],
    meters: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: dict[str, Any],
) -> None:
    """Write the state of a run into its directory.

    Raises:
        FloatingPointError: the weights are not finite; the last good state stays.
        OSError: the disk is full; the last good state stays.
    """
    frozen = frozen_names(model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise FloatingPointError(f"the weights are no longer finite numbers ({broken[0]}), so they are not saved")
    folder = directory / STATE
    if frozen and not (folder / "frozen.pt").is_file():
        whole = model.state_dict()
        save_checkpoint({"format": FORMAT, "model": {name: whole[name] for name in frozen}}, folder / "frozen.pt")
    content = {
        "format": FORMAT,
        "identity": asdict(identity),
        "progress": asdict(progress),
        "rng": rng,
        "meters": meters,
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler,
    }
    save_checkpoint(content, folder / "last.pt")


def read_state(directory: Path) -> SavedState:
    """Read the state of a run.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    path = directory / STATE / "last.pt"
    content = load_checkpoint_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of a run of this version: name another run directory")
    try:
        weights = dict(content["model"])
        frozen = path.with_name("frozen.pt")
        if frozen.is_file():
            weights |= load_checkpoint_file(frozen)["model"]
        return SavedState(
            path,
            RunIdentity(**content["identity"]),
            Progress(**content["progress"]),
            list(content["rng"]),
            list(content["meters"]),
            weights,
            content["optimizer"],
            content["scheduler"],
            content["scaler"],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}): start again from saved weights with --resume-path"
        ) from error


def restore_weights(model: nn.Module, state: SavedState) -> None:
    """Copy the weights of a state into a model of the same configuration.

    Raises:
        CheckpointError: names or shapes disagree.
    """
    load_state_dict_strictly(model, state.weights, source=str(state.path))
