"""A run's folder: what training writes there, and how inference and search find a trained model in it."""

import argparse
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tbps_common
from fafa.model.settings import MODEL_CONFIG, write_model_config
from fafa.options import TRANSFORMS, TrainingFlags
from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import new_run_folder, write_json, write_text
from tbps_common.models.source import HUB_CONFIG, find_model, is_hub_folder

HYPERPARAMETERS = "training_hyperparameters.json"
# The authors' file holds exactly these; all flags together are in FLAGS.
RECORDED = (
    "backbone", "batch_size", "blip_model_name", "exp_name", "fd_margin", "fda_alpha", "fda_k", "itcpr_root",
    "json_path", "learning_rate", "loss_fd", "loss_fda", "loss_mfr", "num_epochs", "num_workers", "resume_path",
    "save_best", "save_last", "save_memory", "save_training", "setting", "syncpr_data_path", "target_ratio",
    "transform", "validation_frequency", "validation_step",
)  # fmt: skip
FLAGS = "flags.json"
LOG = "train_log.txt"
TABLES = {
    "train": "train_metrics.csv",
    "step": "validation_metrics_by_step.csv",
    "epoch": "validation_metrics_by_epoch.csv",
}
WEIGHTS = "saved_models"
BEST_BY_STEP, BEST_BY_EPOCH, LAST = "tuned_recall_at1_step", "tuned_recall_at1_epoch", "tuned_last_recall_at1"
# What `--resume` needs: everything that changes, and a frozen ViT, which is written once.
STATE, FROZEN = "training_state/last.pt", "training_state/frozen.pt"

# A colon cannot stand in a file name on Windows.
_STAMP = "%Y-%m-%d_%H-%M-%S" if os.name == "nt" else "%Y-%m-%d_%H:%M:%S"


def create_run_directory(args: TrainingFlags, model_config: Mapping[str, Any]) -> Path:
    """Create `<output-dir>/<YYYY-mm-dd_HH:MM:SS>_<exp-name>` (local time) with what is known at the start.

    That is the authors' file of hyper-parameters, one of all flags, the model's configuration and the code.

    Raises:
        OSError: the folder cannot be created.
    """
    directory = new_run_folder(Path(args.output_dir), _STAMP, args.exp_name)
    record_flags(directory, args)
    write_model_config(model_config, directory)
    if not args.no_code_backup:
        _back_up_code(directory)
    return directory


def record_flags(directory: Path, args: TrainingFlags) -> None:
    """Write the authors' file of hyper-parameters, and one of all flags.

    In a resumed run the flags given now take the place of the former ones, but for what the model was made from.

    Raises:
        InputError: the resumed run's file of hyper-parameters is damaged.
    """
    path = directory / HYPERPARAMETERS
    before = _read_object(path) if path.is_file() else {}
    recorded = {name: getattr(args, name) for name in RECORDED}
    recorded |= {name: before[name] for name in ("backbone", "resume_path") if name in before}
    write_text(path, json.dumps(recorded, sort_keys=True, indent=4) + "\n")
    write_json(directory / FLAGS, dict(sorted(vars(args).items())))


def _back_up_code(directory: Path) -> None:
    """Copy the sources that compute a run's numbers to `code_backup/`: this package and the shared one."""
    for source in (Path(__file__).parent, Path(str(tbps_common.__file__)).parent):
        shutil.copytree(
            source,
            directory / "code_backup" / source.name,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "bench"),
            dirs_exist_ok=True,
        )


def find_run(resume: str, args: TrainingFlags) -> Path:
    """The run directory that `--resume` names: itself, or the newest one of `--exp-name` for `auto`.

    Raises:
        CheckpointError: there is none with a saved state.
    """
    if resume != "auto":
        directory = Path(resume)
        if not has_state(directory):
            raise CheckpointError(
                f"--resume {directory} is not a run directory with a saved state ({STATE}): name one, or start "
                "a new run without --resume"
            )
        return directory
    stamp = r"\d{4}-\d\d-\d\d_\d\d[:-]\d\d[:-]\d\d"
    found = [
        path
        for path in Path(args.output_dir).glob("*")
        if re.fullmatch(rf"{stamp}_{re.escape(args.exp_name)}", path.name) and has_state(path)
    ]
    if not found:
        raise CheckpointError(
            f"--resume auto found no {args.output_dir}/*_{args.exp_name} with a saved state: name a run directory, or "
            "start a new run without --resume"
        )
    return max(found, key=lambda path: path.name)


def has_state(directory: Path) -> bool:
    """Whether a run can be resumed from `directory`."""
    return (directory / STATE).is_file()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file whole, as the released code does; the columns are the rows' keys in the order of first appearance.

    Without rows the file is removed: a resumed run can have gone back behind the first one.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def closing_lines(directory: Path, best_step: float, best_epoch: float, args: TrainingFlags) -> list[str]:
    """What a finished run has to say about its weights.

    Args:
        directory: the run directory.
        best_step: best R@1 of the validations by step, 0 without any.
        best_epoch: best R@1 of the validations by epoch.
        args: flags of the run.
    """
    lines = []
    for name, by, best in ((BEST_BY_STEP, "step", best_step), (BEST_BY_EPOCH, "epoch", best_epoch)):
        if best:
            lines.append(f"best R@1 of the validations by {by}: {best}")
        elif (directory / TABLES[by]).is_file() and args.save_training and args.save_best:
            lines.append(f"no validation by {by} had an R@1 above 0, so there is no {WEIGHTS}/{name}.pt")
    saved = [name for name in (BEST_BY_EPOCH, BEST_BY_STEP, LAST) if (directory / WEIGHTS / f"{name}.pt").is_file()]
    if saved:
        lines.append(
            f"evaluate it with: python inference_fafa.py --exp-dir {directory} --model-name {saved[0]}.pt "
            f"(saved: {', '.join(saved)})"
        )
    else:
        lines.append(f"no weights were saved in {directory / WEIGHTS}")
    return lines


@dataclass(frozen=True)
class Hyperparameters:
    """The entries of `training_hyperparameters.json` that inference needs; the defaults are for a file that lacks one."""

    fda_k: int = 6
    fda_alpha: float = 0.5
    fd_margin: float = 0.5
    transform: str = "squarepad"
    target_ratio: float = 1.25
    backbone: str = "pretrain"
    itcpr_root: str = ""


@dataclass(frozen=True)
class TrainedRun:
    """A run directory whose files have been found.

    Attributes:
        directory: it.
        checkpoint: the weights.
        hyperparameters: how it was trained.
        backbone: built-in name or YAML file of the model.
    """

    directory: Path
    checkpoint: Path
    hyperparameters: Hyperparameters
    backbone: str

    @property
    def itcpr_root(self) -> str:
        """The recorded folder of ITCPR.

        Raises:
            InputError: none is recorded.
        """
        if not self.hyperparameters.itcpr_root:
            raise InputError(f"--itcpr-root is needed: {self.directory} records no folder of ITCPR")
        return self.hyperparameters.itcpr_root


def read_run(flags: argparse.Namespace) -> TrainedRun:
    """Find the files of a run, before anything heavy is imported; a folder in the layout of the hub is one, too.

    Raises:
        InputError: a file is missing (the message says which ones are there) or damaged.
    """
    directory = Path(find_model(flags.exp_dir, "--exp-dir"))
    if is_hub_folder(directory):
        config = directory / HUB_CONFIG
        values = _hyperparameters(_read_object(config).get("hyperparameters") or {}, config)
        return TrainedRun(directory, directory, values, flags.backbone or str(config))
    if not directory.is_dir():
        raise InputError(f"--exp-dir {directory} does not exist: give a run directory of the training command")
    recorded = directory / HYPERPARAMETERS
    if not recorded.is_file():
        raise InputError(f"{recorded} does not exist: give a run directory, or put the published file there")
    checkpoint = directory / WEIGHTS / flags.model_name
    if not checkpoint.is_file():
        there = sorted(path.name for path in (directory / WEIGHTS).glob("*") if path.suffix in (".pt", ".safetensors"))
        remedy = f"choose one of {', '.join(there)} with --model-name" if there else "the folder holds no weights"
        raise CheckpointError(f"{checkpoint} does not exist: {remedy}")
    hyperparameters = read_hyperparameters(recorded)
    config = directory / MODEL_CONFIG
    backbone = flags.backbone or (str(config) if config.is_file() else hyperparameters.backbone)
    return TrainedRun(directory, checkpoint, hyperparameters, backbone)


def read_hyperparameters(path: Path) -> Hyperparameters:
    """Read `training_hyperparameters.json`; unknown entries are ignored, because the published file has some.

    Raises:
        InputError: the file is not a JSON object, or an entry has an impossible value.
    """
    return _hyperparameters(_read_object(path), path)


def _hyperparameters(content: dict[str, Any], path: Path) -> Hyperparameters:
    given = {item.name: content[item.name] for item in fields(Hyperparameters) if content.get(item.name) is not None}
    for name, value in given.items():
        default = getattr(Hyperparameters, name)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{path}: '{name}' cannot be {value!r}: correct the file")
    values = Hyperparameters(**given)
    if values.transform not in TRANSFORMS:
        raise InputError(f"{path}: 'transform' must be one of {', '.join(TRANSFORMS)}, not {values.transform!r}")
    if values.fda_k < 1 or values.target_ratio <= 0:
        raise InputError(f"{path}: 'fda_k' and 'target_ratio' must be positive: correct the file")
    return values


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object: copy or download it again")
    return content
