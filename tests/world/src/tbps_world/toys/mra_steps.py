"""`run.py` as a step of the toys."""

import os
import sys
from pathlib import Path

from tbps_world.toys.steps import echo, run_child


def run_script(folder: Path, arguments: list[str]) -> None:
    """Show and run `run.py` as a process of its own, in a folder.

    Raises:
        StepFailed: it did not return 0.
    """
    echo(["cd", str(folder), "&&", "python3", "run.py", *arguments])
    run_child([sys.executable, "run.py", *arguments], cwd=folder, env={"OMP_NUM_THREADS": "1", **os.environ})
