"""`tbps-model` on the files of MRA."""

import json
from pathlib import Path

import pytest
import torch

from tbps_common.cli import model_main


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("data/checkpoint/ft_rstp.pth", "checkpoint of MRA"),
        ("data/checkpoint/pretrain.pth", "checkpoint of MRA"),
        ("data/bert-base-uncased", "BERT"),
        ("data/swin_base_patch4_window7_224_22k.pth", "Swin"),
    ],
)
def test_checkpoints_and_start_files_are_recognised(file: str, layout: str, in_world: Path, tmp_path: Path) -> None:
    assert model_main(["inspect", file, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["paper"] == "MRA" and found["layout"].startswith(layout) and found["fits"] is True


def test_the_configuration_in_a_checkpoint_tells_the_size_of_images(
    trained: Path, in_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model_main(["inspect", str(trained / "checkpoint_best.pth"), "--no_checksum"]) == 0
    assert "images of 96 x 96" in capsys.readouterr().out
    bare = torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"]
    torch.save(bare, tmp_path / "bare.pth")
    assert model_main(["inspect", str(tmp_path / "bare.pth"), "--no_checksum"]) == 0
    assert "images of" not in capsys.readouterr().out
