"""`mra-toy`: a step that fails ends it (the toys run whole in tests/world)."""

import os
from pathlib import Path

import pytest

from tbps_world.cli import mra_toy_main


def test_step_that_fails_ends_the_toy_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert mra_toy_main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capfd.readouterr().err
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert mra_toy_main(["--out", str(tmp_path / "closed" / "toy")]) != 0
