"""A handful of pictures, a tiny model, and the README's training command with flags for their size."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tbps_world.tiny.fafa import TINY_MODEL, WORDS, write_tiny_model, write_toy_data

PACKAGE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m tbps_world.tiny.fafa`: tiny.yaml, vocab.txt, syncpr/, itcpr/. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("toy")
    write_tiny_model(folder, TINY_MODEL, WORDS)
    write_toy_data(folder)
    return folder


@pytest.fixture(scope="session")
def calm_model(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """The tiny model without drop-out and DSU: its losses depend on the batch and the masks of MFR alone."""
    folder = tmp_path_factory.mktemp("calm")
    settings = {**TINY_MODEL, "use_dsu": False, "use_mlm": False}
    settings["qformer"] = {
        **TINY_MODEL["qformer"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return write_tiny_model(folder, settings, WORDS)


@pytest.fixture(scope="session")
def train_flags(toy: Path) -> Callable[..., list[str]]:
    """`train_flags(output_dir, *more)`: the README's flags, flags for the toy's size, and `more`."""
    from tbps_world.toys.fafa import README_FLAGS

    def flags(output_dir: Path, *more: str) -> list[str]:
        return [
            *("--dataset", "cpr", "--syncpr-data-path", str(toy / "syncpr"), "--itcpr-root", str(toy / "itcpr")),
            *README_FLAGS,
            *("--backbone", str(toy / "tiny.yaml"), "--exp-name", "toy", "--output-dir", str(output_dir)),
            *("--batch-size", "4", "--num-epochs", "2", "--num-workers", "0", "--eval-num-workers", "0"),
            *("--validation-step", "3", "--save-last", "--seed", "0", "--device", "cpu", "--no-code-backup"),
            *more,
        ]

    return flags


@pytest.fixture(scope="session")
def only_run() -> Callable[[Path], Path]:
    """`only_run(output_dir)`: the one run directory under it."""

    def find(output_dir: Path) -> Path:
        (directory,) = [path for path in output_dir.iterdir() if path.is_dir()]
        return directory

    return find


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> Path:
    """The run directory of the README's command on the toy, two epochs. Tests must not write into it."""
    from fafa.cli import train_main

    output_dir = tmp_path_factory.mktemp("output")
    assert train_main(train_flags(output_dir)) == 0
    return only_run(output_dir)


@pytest.fixture(scope="session")
def start_script() -> Callable[..., "subprocess.Popen[str]"]:
    """`start_script("inference_fafa.py", flags, cwd=...)`: start a script of the package as a user does."""

    def start(script: str, flags: list[str], cwd: Path | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(PACKAGE / script), *flags],
            cwd=cwd or PACKAGE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
