"""`checkpoint-N` folders of a run: which to go on from, putting a new one in place, which to delete. Needs no torch."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from tbps_common.errors import CheckpointError, InputError

STATE_NAME = "trainer_state.json"
UNFINISHED = ".unfinished"
ARGUMENTS_NAME = "arguments.json"
LOG_NAME = "train_log.jsonl"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoint folders, by number of steps, the last one at the end."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_NAME).is_file()]


def checkpoints_to_resume(requested: str, output_dir: Path, *, overwrite: bool) -> list[Path]:
    """Where a run may go on, best first; none: it starts from the beginning.

    Args:
        requested: value of `--resume_from_checkpoint`: a folder; True for the last checkpoint of the output folder; empty
            or False for that too, if there is one and it is not to be overwritten.
        output_dir: of the run.
        overwrite: start from the beginning although there are checkpoints.

    Returns:
        The folder that is named, or all complete checkpoints of the output folder, the last one first.

    Raises:
        CheckpointError: there is no such checkpoint, or it lacks the state of the run.
        InputError: `output_dir` is a file, or the folder holds something else and is not to be overwritten.
    """
    if requested.lower() == "true":
        found = checkpoints(output_dir)[::-1]
        if not found:
            raise CheckpointError(
                f"{output_dir} holds no checkpoint to resume from: leave out --resume_from_checkpoint"
            )
        return found
    if requested.lower() not in ("", "false", "none"):
        folder = Path(requested)
        if not folder.is_dir():
            raise CheckpointError(f"--resume_from_checkpoint {folder} does not exist: give a checkpoint-N folder")
        if not (folder / STATE_NAME).is_file():
            raise CheckpointError(
                f"{folder} holds no {STATE_NAME}, so training cannot resume from it: start from its weights with --pretrained"
            )
        return [folder]
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: give a folder")
    if overwrite or not output_dir.is_dir():
        return []
    found = checkpoints(output_dir)[::-1]
    if not found and any(path.name not in (UNFINISHED, ARGUMENTS_NAME, LOG_NAME) for path in output_dir.iterdir()):
        raise InputError(
            f"--output_dir {output_dir} is not empty and holds no checkpoint to resume from: give another folder, or "
            "--overwrite_output_dir True"
        )
    return found


def check_state(folder: Path) -> None:
    """Require that the small files of a checkpoint can be read.

    Raises:
        CheckpointError: the state is damaged.
    """
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        steps = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_NAME} is damaged ({error}): resume from another checkpoint") from error
    if not isinstance(steps, int) or steps < 0:
        raise CheckpointError(f"{folder / STATE_NAME} counts {steps!r} steps: resume from another checkpoint")


def earlier_results(output_dir: Path) -> list[Path]:
    """What an earlier run left and a new one replaces: checkpoint folders, and the model in the folder itself."""
    if not output_dir.is_dir():
        return []
    model = [output_dir / name for name in ("config.json", "model.safetensors")]
    return [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)] + [p for p in model if p.is_file()]


def install_checkpoint(written: Path, output_dir: Path, *, replaced: list[Path], keep: int | None) -> None:
    """Move a checkpoint folder to its place when all of it is on the disk: a kill never leaves a part under its name.

    Args:
        written: the folder, on the same disk as `output_dir`.
        output_dir: of the run.
        replaced: results of an earlier run, deleted after the checkpoint is in place.
        keep: how many checkpoints stay; `None`: all.
    """
    for path in written.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(written)
    target = output_dir / written.name
    # Moved away first, deleted last: deleting many gigabytes takes time, and a kill meanwhile would leave nothing.
    aside = Path(tempfile.mkdtemp(prefix="replaced-", dir=written.parent))
    for path in {*replaced, target}:
        if path.exists():
            os.rename(path, aside / path.name)
    os.rename(written, target)
    _flush_folder(output_dir)
    delete([aside])
    if keep:
        delete(checkpoints(output_dir)[:-keep])


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(paths: list[Path]) -> None:
    """Delete files and folders; what cannot be deleted stays."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
