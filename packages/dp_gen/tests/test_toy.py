"""`dp-toy` in its shortest form: every command of it runs, and learns."""

import json
from pathlib import Path

import pytest

from tbps_world.cli import dp_toy_main


@pytest.mark.slow
def test_the_toy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy"
    flags = ["--out", str(out), "--updates", "30", "--resolution", "64", "--inference_steps", "3", "--edits", "2"]
    flags += ["--vae_updates", "20", "--start", "random", "--preset", "tiny", "--ids", "44"]
    assert dp_toy_main(flags) == 0
    numbers = json.loads((out / "metrics.json").read_text("utf-8"))
    assert numbers["after"]["denoise_loss"] < numbers["before"]["denoise_loss"]
    assert numbers["after"]["localization_loss"] < numbers["before"]["localization_loss"]
    assert numbers["after"]["attention_inside"] > numbers["before"]["attention_inside"]
    assert numbers["colours"]["regions"] >= 2 and 0 <= numbers["colours"]["given"] <= 1
    for name in ("attention.png", "edits/contact_sheet.png", "new/contact_sheet.png", "annotations.jsonl"):
        assert (out / name).stat().st_size > 0, name
    assert "new caption" in capfd.readouterr().out
