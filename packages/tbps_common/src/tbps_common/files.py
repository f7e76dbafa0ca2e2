"""Files that are either whole or not there: write beside the target, flush to disk, then rename."""

import glob
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST_WRITE = 3600.0  # seconds


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, one_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`, on failure it is removed.

    The folder is created. The data and the rename are flushed to disk before the context ends, so a process killed at
    any moment leaves the old file or the new one, never a part. The temporary name keeps the suffix of `path`, because
    some writers choose the format by it.

    Args:
        path: of the file.
        one_writer: no two processes write `path` at the same time. Then the temporary name is always the same, and what a
            killed writer left is overwritten; otherwise the folder is searched for that, which takes 0.2 s in a folder of
            100,000 files.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not one_writer:
        _remove_leftovers(target)
    writer = "" if one_writer else os.getpid()
    temporary = target.with_name(f".{target.stem}.tmp{writer}{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # A failing write names no file by itself, and its reader wants to know which one is missing.
        error.filename = error.filename or str(target)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Delete temporary files of the same target whose writer was killed: a checkpoint's would fill the disk."""
    prefix = f".{target.stem}.tmp"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*{glob.escape(target.suffix)}"):
        writer = leftover.name[len(prefix) : len(leftover.name) - len(target.suffix)]
        if writer.isdigit() and not _is_running(int(writer)):
            leftover.unlink(missing_ok=True)
    if target.suffix == ".safetensors":
        # The library writes through a file of its own, whose name does not tell by whom; what is written now is younger.
        for leftover in target.parent.glob(".tmp??????"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _LONGEST_WRITE:
                    leftover.unlink()


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there os.kill would not ask but interrupt
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there, and its entries need no flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str, *, one_writer: bool = False) -> None:
    """Write `text` as UTF-8 with `\\n` line ends, whole or not at all; `one_writer` as for `atomic_path`."""
    with atomic_path(path, one_writer=one_writer) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON, whole or not at all.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot express.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def new_run_folder(parent: Path, stamp: str, name: str) -> Path:
    """Create `<parent>/<stamp>_<name>` for a new run.

    Args:
        parent: created too if it is missing.
        stamp: format of the local time, as for `time.strftime`.
        name: of the run.

    Raises:
        OSError: the folder cannot be created.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = parent / f"{time.strftime(stamp)}_{name}"
        try:
            directory.mkdir()
        except FileExistsError:  # two runs of one name within a second
            time.sleep(0.2)
        else:
            return directory
