"""`mra-dad-toy` in a short form: from nothing to MRA trained on a data set of its own making, and once more."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tbps_world.cli import dad_toy_main


@pytest.mark.slow
def test_toy_runs_to_its_end_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy"
    amount = ("--ids", "12", "--steps", "2", "--captions", "6", "--variants", "3", "--epochs", "1", "--start", "random")
    assert dad_toy_main(["--out", str(out), *amount]) == 0
    shown = capfd.readouterr().out
    stages = ("finetune", "generate", "filter", "caption", "regions")
    steps = ["tbps-synth", "mra-make-tiny", "mra-dad-make-tiny", *(f"mra-dad {stage}" for stage in stages)]
    commands = [line for line in shown.splitlines() if line.startswith("$ ")]
    found = [next(i for i, line in enumerate(commands) if step in line) for step in [*steps, "run.py --task sda"]]
    assert found == sorted(found)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stages"]["generate"]["kept"] == 18
    # MRA has trained on the result: its checkpoint of the last epoch is there, in the authors' layout.
    assert (out / "out/pre_sda/checkpoint_0.pth").is_file()
    assert float(metrics["pretraining"][-1]["loss"]) > 0
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.size == (684, 664)
    assert dad_toy_main(["--out", str(out), *amount]) == 0
    again = capfd.readouterr().out
    assert "models is there already" in again and "18 of 18 pictures are there already" in again


def test_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert dad_toy_main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
