"""`tbps-model` on the files of CMLFA."""

import json
from pathlib import Path

import pytest
import torch

from tbps_common.cli import model_main


def test_a_trained_run_and_its_start_file_are_recognised(
    trained_run: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, layout in ((trained_run / "best.pth", "checkpoint of CMLFA"), (tiny_clip, "CLIP with a ViT")):
        assert model_main(["inspect", str(file), "--json", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert found["paper"] == "CMLFA" and found["layout"].startswith(layout) and found["fits"] is True
    shown = capsys.readouterr().out
    assert "identities:  6\n" in shown and "1 layers, 64 wide, patch 16" in shown


def test_what_does_not_fit_is_named(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(trained_run / "best.pth", weights_only=True)["model"]
    state["safl.extra"] = state.pop("safl.pos_embeding")
    state["safl.feed.1.bias"] = torch.zeros(3)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "file.pth")
    assert model_main(["inspect", str(tmp_path / "file.pth"), "--no_checksum"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    for line in (
        "missing:     1: safl.pos_embeding",
        "unexpected:  1: safl.extra",
        "misshapen:   1: safl.feed.1.bias [3]",
    ):
        assert line in shown
