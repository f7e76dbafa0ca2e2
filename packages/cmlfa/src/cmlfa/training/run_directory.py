"""Where a run writes, and which checkpoint an interrupted run goes on from."""

import argparse
import re
import time
from pathlib import Path

from cmlfa.config import CONFIG_NAME
from tbps_common.errors import CheckpointError

BEST_NAME = "best"
LAST_NAME = "last"


def create_run_directory(args: argparse.Namespace) -> Path:
    """Create `<output_dir>/<dataset_name>/<YYYYmmdd_HHMMSS>_<name>` (local time).

    Raises:
        OSError: the folder cannot be created.
    """
    parent = Path(args.output_dir) / args.dataset_name
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = parent / f"{time.strftime('%Y%m%d_%H%M%S')}_{args.name}"
        try:
            directory.mkdir()
        except FileExistsError:  # two runs of one name within a second
            time.sleep(0.2)
        else:
            return directory


def resume_checkpoint(args: argparse.Namespace) -> Path:
    """The checkpoint of `--resume`: the named file, or the newest `last.pth` of the runs called `--name`.

    Raises:
        CheckpointError: there is no such file.
    """
    if args.resume_ckpt_file:
        path = Path(args.resume_ckpt_file)
        if not path.is_file():
            raise CheckpointError(f"--resume_ckpt_file {path} is not a file: name an existing checkpoint")
        return path
    parent = Path(args.output_dir) / args.dataset_name
    found = [
        path
        for path in parent.glob(f"*/{LAST_NAME}.pth")
        if re.fullmatch(rf"\d{{8}}_\d{{6}}_{re.escape(args.name)}", path.parent.name)
    ]
    if not found:
        raise CheckpointError(
            f"--resume found no {parent}/*_{args.name}/{LAST_NAME}.pth: name a checkpoint with --resume_ckpt_file, or "
            "start a new run without --resume"
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))


def own_run_directory(checkpoint: Path) -> Path | None:
    """The run directory of this project that `checkpoint` lies in, or None (a file of the authors, a copied file)."""
    folder = checkpoint.parent
    is_run = (folder / f"{LAST_NAME}.pth").is_file() and (folder / CONFIG_NAME).is_file()
    return folder if is_run else None


def remove_partial_checkpoints(directory: Path) -> None:
    """Delete what a process left behind that was killed while it wrote a checkpoint (see `tbps_common.files`)."""
    for name in (BEST_NAME, LAST_NAME):
        for partial in directory.glob(f".{name}.tmp*.pth"):
            partial.unlink(missing_ok=True)
