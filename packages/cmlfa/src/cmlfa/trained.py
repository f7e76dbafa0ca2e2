"""A trained model and its flags, opened from a run directory: what testing, pictures and search start from."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlfa.config import CONFIG_NAME, Config, load_train_configs
from cmlfa.options import DEVICES, PRECISIONS, add_trust_flag
from tbps_common.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from cmlfa.model import CMLFA

# Flags that, beside the weights, decide the features.
FEATURE_FLAGS = ("img_size", "stride_size", "text_length", "lfa_attention")
_ENCODER = ("base_model.", "shared_transformer.", "safl.")
_SHOWN = 5


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode on its device, with the flags it was trained with."""

    args: Config
    model: "CMLFA"
    device: "torch.device"
    run_directory: Path
    checkpoint: Path
    fingerprint: str
    """Of the encoders' weights as stored, and of the flags that decide the features."""


def add_run_flags(parser: Any, *, required: bool = False) -> None:
    """The flags that name a trained model: `--config_file` and what may be changed about it."""
    parser.add_argument(
        "--config_file", required=required, help=f"the {CONFIG_NAME} of a run directory, written by train.py"
    )
    parser.add_argument("--checkpoint", help="weights to use (default: best.pth of the run directory)")
    parser.add_argument("--device", choices=DEVICES, help="where to compute (default: as trained)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (default: as trained)")
    add_trust_flag(parser)


def read_run(flags: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The flags of the run that `--config_file` names, with those of `overrides` that were given on the command line.

    Raises:
        InputError: there is no such file; without `--config_file` the run directories found are listed.
    """
    if flags.config_file is None:
        raise InputError(_which_run(Path("logs")))
    args = load_train_configs(flags.config_file)
    for name in ("device", "precision", *overrides):
        value = getattr(flags, name)
        if value is not None:
            args[name] = value
    args.training = False
    return args


def _which_run(root: Path) -> str:
    found = sorted(root.glob(f"*/*/{CONFIG_NAME}"), key=lambda path: path.parent.name, reverse=True)
    if not found:
        return (
            f"--config_file is needed: the {CONFIG_NAME} of a run directory; there is none under {root}/, train a model "
            "with train.py first"
        )
    shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    return f"--config_file is needed: the {CONFIG_NAME} of a run directory; {len(found)} found, newest first: {shown}"


def find_checkpoint(args: Config, flags: argparse.Namespace) -> tuple[Path, Path]:
    """Run directory and weights file of a run.

    The folder that the configuration names is used if it is there; a run that was moved or copied is found beside its
    configuration.

    Raises:
        CheckpointError: there is no such weights file.
    """
    beside = Path(flags.config_file).parent
    stored = Path(args.output_dir)
    folders = [stored, beside] if stored.is_dir() else [beside]
    directory = next((folder for folder in folders if (folder / "best.pth").is_file()), folders[0])
    checkpoint = Path(flags.checkpoint) if flags.checkpoint else directory / "best.pth"
    if not checkpoint.is_file():
        last = directory / "last.pth"
        remedy = f"--checkpoint {last} takes the last epoch's" if last.is_file() else "name one with --checkpoint"
        raise CheckpointError(f"there are no weights {checkpoint}: {remedy}")
    return directory, checkpoint


def open_trained(flags: argparse.Namespace, args: Config) -> TrainedModel:
    """Build the model of a run and load its weights.

    The sizes of the CLIP towers are taken from the checkpoint, so the file or download that training started from is
    not needed any more.

    Raises:
        InputError: a flag does not fit the weights, or the device is not there.
        CheckpointError: the weights are missing, damaged, or of another model.
    """
    directory, checkpoint = find_checkpoint(args, flags)
    from cmlfa.model import build_model, clip_geometry, load_checkpoint
    from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    content = load_checkpoint_file(checkpoint, trust=flags.trust_checkpoint)
    state, _ = find_state_dict(content, source=str(checkpoint))
    geometry = clip_geometry(state, str(checkpoint), prefix="base_model.")
    classifier = state.get("classifier.weight")
    model = build_model(args, len(classifier) if classifier is not None else 1, geometry=geometry)
    try:
        load_checkpoint(model, content, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} does not fit the flags of {flags.config_file}: {error}") from error
    encoders = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODER)}
    settings = {name: _plain(args[name]) for name in FEATURE_FLAGS}
    return TrainedModel(
        args=args,
        model=model.to(device).eval(),
        device=device,
        run_directory=directory,
        checkpoint=checkpoint,
        fingerprint=fingerprint(encoders, settings),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
