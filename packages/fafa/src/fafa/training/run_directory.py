"""Where a run writes: its folder, the recorded hyper-parameters, the copy of the code, the tables of numbers."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from tbps_common.errors import CheckpointError
from tbps_common.files import write_json, write_text

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
STATE = "training_state"
"""Folder of what `--resume` needs."""

# A colon cannot stand in a file name on Windows.
_STAMP = "%Y-%m-%d_%H-%M-%S" if os.name == "nt" else "%Y-%m-%d_%H:%M:%S"


def create_run_directory(output_dir: str, exp_name: str) -> Path:
    """Create `<output_dir>/<YYYY-mm-dd_HH:MM:SS>_<exp_name>` (local time).

    Raises:
        OSError: the folder cannot be created.
    """
    parent = Path(output_dir)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = parent / f"{time.strftime(_STAMP)}_{exp_name}"
        try:
            directory.mkdir()
        except FileExistsError:  # two runs of one name within a second
            time.sleep(0.2)
        else:
            return directory


def write_hyperparameters(directory: Path, args: argparse.Namespace) -> None:
    """Write the authors' file of hyper-parameters, and one of all flags."""
    recorded = {name: getattr(args, name) for name in RECORDED}
    write_text(directory / HYPERPARAMETERS, json.dumps(recorded, sort_keys=True, indent=4) + "\n")
    write_json(directory / FLAGS, dict(sorted(vars(args).items())))


def back_up_code(directory: Path) -> None:
    """Copy the sources that compute a run's numbers to `code_backup/`: this package and the shared one."""
    import fafa
    import tbps_common

    for package in (fafa, tbps_common):
        source = Path(str(package.__file__)).parent
        shutil.copytree(
            source,
            directory / "code_backup" / source.name,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "synth", "bench*"),
            dirs_exist_ok=True,
        )


def find_run(args: argparse.Namespace) -> Path:
    """The run directory that `--resume` names: itself, or the newest one of `--exp-name` for `auto`.

    Raises:
        CheckpointError: there is none with a saved state.
    """
    if args.resume != "auto":
        directory = Path(args.resume)
        if not has_state(directory):
            raise CheckpointError(
                f"--resume {directory} is no run directory with a saved state ({STATE}/last.pt): name one, or start a new "
                "run without --resume"
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
    return (directory / STATE / "last.pt").is_file()


class Table:
    """A CSV file of numbers, always written whole, as the released code does.

    Args:
        path: file to write.
        rows: of the table; further ones are appended to this list.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]):
        self.path, self.rows = path, rows

    def write(self) -> None:
        """Write the rows, with their keys in the order of first appearance as columns; without rows remove the file."""
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


def closing_lines(directory: Path, best_step: float, best_epoch: float, args: argparse.Namespace) -> list[str]:
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
