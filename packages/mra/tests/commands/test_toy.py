"""`mra-toy` in a short form: all steps, the table of both stages, and going on after an interruption."""

import json
import os
from pathlib import Path

import pytest

from tbps_world.cli import mra_toy_main


@pytest.mark.slow
def test_toy_runs_to_its_table_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path / "toy"), "--preset", "tiny", "--start", "random"]
    flags += ["--sda_epochs", "1", "--cuhk_epochs", "2"]
    assert mra_toy_main(flags) == 0
    shown = capfd.readouterr().out
    commands = [line for line in shown.splitlines() if line.startswith("$ ") and "torch" not in line]
    steps = ["tbps-synth", "mra-make-tiny", "--task sda", "--task cuhk", "--evaluate"]
    found = [next(i for i, line in enumerate(commands) if step in line) for step in steps]
    assert found == sorted(found)
    metrics = json.loads((tmp_path / "toy" / "metrics.json").read_text())
    first = [stage["R1"] for stage in metrics["stages"].values()]
    assert f"ITC stage {first[0]:.2f} %, after re-ranking {first[1]:.2f} %" in shown
    assert metrics["chance_R1"] == pytest.approx(100 / 12)  # every person has equally many pictures
    # A second call finds everything done, and comes to the same figures.
    assert mra_toy_main(flags) == 0
    assert "all 2 epochs are done already" in capfd.readouterr().out
    again = json.loads((tmp_path / "toy" / "metrics.json").read_text())
    assert again["stages"] == metrics["stages"]


def test_step_that_fails_ends_the_toy_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert mra_toy_main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capfd.readouterr().err
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert mra_toy_main(["--out", str(tmp_path / "closed" / "toy")]) != 0
