"""The state of a run between two steps: what `--resume` needs to go on to the bit where the run was.

`training_state/last.pt` holds everything that changes; `training_state/frozen.pt` holds a frozen ViT, which is written
once. Neither the start weights nor their downloads are needed to resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fafa.run_directory import FROZEN, STATE, TABLES
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file, load_state_dict_strictly, save_checkpoint

FORMAT = "fafa-state/1"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the current epoch, from 0.
        batch: batches of it that are trained.
        pending: `step` if the validation of the last step has not been made yet, else empty.
        best_step: best R@1 of the validations by step.
        best_epoch: best R@1 of the validations by epoch.
        tables: rows of the CSV files by name.
    """

    epoch: int = 0
    batch: int = 0
    pending: str = ""
    best_step: float = 0.0
    best_epoch: float = 0.0
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})


@dataclass
class TrainedWeights:
    """The weights that change, as a part of the state."""

    model: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        """The weights but for the frozen ones."""
        return _weights(self.model, frozen=False)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """All weights, the frozen ones included."""
        load_state_dict_strictly(self.model, state, source=f"the run's {STATE}")


def save_frozen(model: nn.Module, directory: Path) -> None:
    """Write the frozen weights, if there are some, once."""
    weights = _weights(model, frozen=True)
    if weights and not (directory / FROZEN).is_file():
        save_checkpoint({"format": FORMAT, "model": weights}, directory / FROZEN)


def _weights(model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
    untrained = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if (name in untrained) is frozen}


def read_state(directory: Path) -> dict[str, Any]:
    """Read the state of a run, the frozen weights included.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    path = directory / STATE
    state = load_checkpoint_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of a run of this version: name another run directory")
    try:
        if (directory / FROZEN).is_file():
            state["model"] |= load_checkpoint_file(directory / FROZEN)["model"]
        for meters in state["meters"]:
            if "samples" in meters:  # written before the weights were kept by name
                meters["weights"] = dict.fromkeys(meters["sums"], meters.pop("samples"))
        Progress(**state["progress"])
        identity = dict(state["identity"])
        schedule = state.get("schedule", {"num_epochs": identity["num_epochs"]} if "num_epochs" in identity else {})
        return {**state, "identity": identity, "schedule": schedule}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}): start again from saved weights with --resume-path"
        ) from error


def require_same_run(state: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on under other circumstances.

    Raises:
        CheckpointError: names what changed and how.
    """
    names = {"items": "the number of triplets", "processes": "the number of processes"}
    data = {"syncpr": "--syncpr-data-path", "itcpr": "--itcpr-root"}
    before = state["identity"]
    for key in now:
        if before.get(key, now[key]) == now[key]:  # an older state has no digests of the data
            continue
        if key in data:
            change = f"other data than {data[key]} names now: resume with the data of the run"
        else:
            name = names.get(key, f"--{key.replace('_', '-')}")
            change = f"{name} {before[key]}, and now it is {now[key]}: resume with {before[key]}"
        raise CheckpointError(
            f"{path} belongs to a run with {change}, or start a new run from its weights with --resume-path"
        )
