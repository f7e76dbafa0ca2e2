"""Commands made of commands (the toys): every step is shown, run, and ends everything with its exit status if it fails."""

import argparse
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError

RANDOM = "random"
"""What `--start` says for networks of random weights."""


class StepFailed(Exception):
    """A command ended with another status than 0; it has said why.

    Attributes:
        status: its exit status; 128 + N after signal N.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def call(name: str, command: Callable[[list[str]], int], arguments: Sequence[str]) -> None:
    """Show and run a console command in this process.

    Args:
        name: as it is typed, such as `tbps-synth` or `fafa-make-tiny`.
        command: takes the arguments and returns the exit status.
        arguments: of the command.

    Raises:
        StepFailed: it did not return 0.
    """
    echo([*name.split(), *arguments])
    status = command(list(arguments))
    if status:
        raise StepFailed(status)


def add_start(parser: argparse.ArgumentParser) -> None:
    """Add the flag of `start_weights`."""
    parser.add_argument(
        "--start",
        metavar="DIR",
        default="build/start",
        help=f"folder of tbps-train-tiny's start weights, trained there if they are absent; {RANDOM}: random weights "
        "(default: %(default)s)",
    )


def start_weights(name: str, start: str) -> Path | None:
    """The folder of a start weight, trained now if it is not there; None for random weights.

    Args:
        name: of `tbps-train-tiny`.
        start: what `--start` says.

    Raises:
        StepFailed: the training did not return 0.
    """
    if start == RANDOM:
        return None
    from tbps_world.cli import train_tiny_main

    call("tbps-train-tiny", train_tiny_main, [name, "--out", start])
    return Path(start).resolve() / name


def link_start(name: str, start: str, place: Path) -> None:
    """Let `place`, where a paper's command looks for a model, be a link to a start weight; as `start_weights`."""
    folder = start_weights(name, start)
    if folder is None:
        raise ValueError(f"there is no folder of random weights to link {place} to")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(folder)


def run_child(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, group: bool = False
) -> None:
    """Run a command as a process of its own and wait for it. Signals are the child's to handle.

    Args:
        command: program and arguments.
        cwd: folder to run it in.
        env: whole environment of the child.
        group: signal the child's whole process group, for a launcher that dies without telling what it has started.

    Raises:
        StepFailed: it did not return 0.
    """
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: Any) -> None:
        # Ctrl-C in a terminal reaches the child without our doing; it saves its state and ends.
        if child is not None and group:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
        elif child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    # Handlers, not SIG_IGN, which a child would inherit.
    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(list(command), cwd=cwd, env=env, start_new_session=group)
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        raise StepFailed(status if status > 0 else 128 - status)


def echo(command: Sequence[str], folder: Path | None = None) -> None:
    """Show a command as it would be typed, and where; `&&` stands as it is."""
    where = f"(in {folder}) " if folder is not None else ""
    print(f"\n{where}$ {' '.join(word if word == '&&' else shlex.quote(word) for word in command)}\n", flush=True)


def checkout_of(package: str) -> Path:
    """The folder of a paper's package in the checkout, where its scripts lie.

    Raises:
        InputError: the package is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"the package {package} is not installed: pip install packages/{package}")
    return Path(found.origin).parents[2]
