"""`run.py`, and a change of its configuration, as steps of the toys."""

import os
import sys
from pathlib import Path

from tbps_common.files import write_text
from tbps_world.toys.steps import echo, run_child


def run_script(folder: Path, arguments: list[str]) -> None:
    """Show and run `run.py` as a process of its own, in a folder.

    Raises:
        StepFailed: it did not return 0.
    """
    echo(["cd", str(folder), "&&", "python3", "run.py", *arguments])
    run_child([sys.executable, "run.py", *arguments], cwd=folder, env={"OMP_NUM_THREADS": "1", **os.environ})


def set_entry(folder: Path, task: str, key: str, value: float) -> None:
    """Show and make a change of one line of `configs/<task>.yaml`."""
    file = folder / f"configs/{task}.yaml"
    echo(["sed", "-i", f"s/^{key}: .*/{key}: {value}/", str(file)])
    lines = [
        f"{key}: {value}" if line.startswith(f"{key}:") else line
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    write_text(file, "".join(f"{line}\n" for line in lines))
