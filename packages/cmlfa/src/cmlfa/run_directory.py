"""Run directories: where a run writes, which checkpoint an interrupted run continues from, and which run to open."""

import argparse
import logging
import re
from pathlib import Path

from cmlfa.config import CONFIG_NAME, changed_flags, load_train_configs, save_train_configs
from cmlfa.options import OVERRIDES, Options
from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import new_run_folder
from tbps_common.models.source import HUB_CONFIG, find_model, is_hub_folder, is_model
from tbps_common.run.logs import RunLog

BEST_NAME = "best"
LAST_NAME = "last"
_SHOWN = 5

logger = logging.getLogger("IRRA.train")


def resume_checkpoint(options: Options) -> Path:
    """The checkpoint of `--resume`: the named file, or the newest `last.pth` of the runs called `--name`.

    Raises:
        CheckpointError: there is no such file, or it belongs to a run on another data set.
    """
    if options.resume_ckpt_file:
        path = Path(options.resume_ckpt_file)
        if not path.is_file():
            raise CheckpointError(f"--resume_ckpt_file {path} is not a file: name an existing checkpoint")
        own = own_run_directory(path)
        trained_on = load_train_configs(own / CONFIG_NAME)["dataset_name"] if own else options.dataset_name
        if trained_on != options.dataset_name:
            raise CheckpointError(
                f"--resume_ckpt_file {path} belongs to a run on {trained_on}, which --dataset_name {options.dataset_name} "
                f"cannot continue: start a new run from its weights with --pretrain_choice {path}, without --resume"
            )
        return path
    parent = Path(options.output_dir) / options.dataset_name
    found = [
        path
        for path in parent.glob(f"*/{LAST_NAME}.pth")
        if re.fullmatch(rf"\d{{8}}_\d{{6}}_{re.escape(options.name)}", path.parent.name)
    ]
    if not found:
        raise CheckpointError(
            f"--resume found no {parent}/*_{options.name}/{LAST_NAME}.pth: name a checkpoint with --resume_ckpt_file, "
            "or start a new run without --resume"
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))


def own_run_directory(checkpoint: Path) -> Path | None:
    """The run directory of this project that `checkpoint` lies in, or None (a file of the authors, a copied file)."""
    folder = checkpoint.parent
    is_run = (folder / f"{LAST_NAME}.pth").is_file() and (folder / CONFIG_NAME).is_file()
    return folder if is_run else None


def open_run_directory(source: Path | None, options: Options, log: RunLog) -> Path:
    """Make the run directory or, resuming, continue in the one the checkpoint lies in; write `configs.yaml`.

    Args:
        source: the checkpoint to resume from.
        options: of the run; `output_dir` becomes the run directory.
        log: written to `train_log.txt` from now on.

    Raises:
        OSError: the directory cannot be written.
    """
    own = own_run_directory(source) if source else None
    if own is not None:
        for name in (BEST_NAME, LAST_NAME):  # what a process left behind that was killed while it wrote a checkpoint
            for partial in own.glob(f".{name}.tmp*.pth"):
                partial.unlink(missing_ok=True)
        for name, (before, now) in changed_flags(load_train_configs(own / CONFIG_NAME), vars(options)).items():
            logger.warning("--%s was %s when the run began, and is %s now", name, before, now)
    directory = own or new_run_folder(Path(options.output_dir) / options.dataset_name, "%Y%m%d_%H%M%S", options.name)
    options.output_dir = str(directory)
    log.open(directory / "train_log.txt", append=own is not None)
    save_train_configs(directory, options)
    logger.info("run directory: %s", directory)
    logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(options).items())))
    return directory


def read_run(flags: argparse.Namespace) -> Options:
    """The options of the run that `--config_file` names, with those that were given on the command line instead.

    A `--checkpoint` on the hub becomes its download; a folder in the layout of the hub is its own configuration.

    Raises:
        InputError: there is no such file; without `--config_file` the run directories found are listed.
    """
    if flags.checkpoint:
        flags.checkpoint = find_model(flags.checkpoint, "--checkpoint")
        if flags.config_file is None and is_hub_folder(flags.checkpoint):
            flags.config_file = str(Path(flags.checkpoint) / HUB_CONFIG)
    if flags.config_file is None:
        raise InputError(_which_run(Path("logs")))
    given = {name: value for name, value in vars(flags).items() if name in OVERRIDES and value is not None}
    return Options.of({**load_train_configs(flags.config_file), **given, "training": False})


def _which_run(root: Path) -> str:
    found = sorted(root.glob(f"*/*/{CONFIG_NAME}"), key=lambda path: path.parent.name, reverse=True)
    if not found:
        return (
            f"--config_file is needed: the {CONFIG_NAME} of a run directory; there is none under {root}/, so train a "
            "model with train.py first"
        )
    shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    return f"--config_file is needed: the {CONFIG_NAME} of a run directory; {len(found)} found, newest first: {shown}"


def find_weights(options: Options, flags: argparse.Namespace) -> Path:
    """The weights to use: those of `--checkpoint`, or `best.pth` of the run directory.

    The folder that the configuration names is used if it is there; a run that was moved or copied is found beside its
    configuration.

    Raises:
        CheckpointError: there is no such file.
    """
    directory = find_directory(options, flags)
    weights = Path(flags.checkpoint) if flags.checkpoint else directory / f"{BEST_NAME}.pth"
    if not flags.checkpoint and is_hub_folder(directory):
        weights = directory
    if not is_model(weights):
        last = directory / f"{LAST_NAME}.pth"
        remedy = f"--checkpoint {last} takes the last epoch's" if last.is_file() else "name one with --checkpoint"
        raise CheckpointError(f"there are no weights at {weights}: {remedy}")
    return weights


def find_directory(options: Options, flags: argparse.Namespace) -> Path:
    """The directory of a run, which may have been moved since its configuration was written."""
    beside = Path(flags.config_file).parent
    if is_hub_folder(beside):
        return beside
    stored = Path(options.output_dir)
    folders = [stored, beside] if stored.is_dir() else [beside]
    return next((folder for folder in folders if (folder / f"{BEST_NAME}.pth").is_file()), folders[0])
