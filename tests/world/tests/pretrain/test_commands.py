import json
from pathlib import Path

import pytest

from tbps_world.cli import train_tiny_main
from tbps_world.pretrain import commands

calls: list[int] = []


def write_number(folder: Path, *, seed: int, steps: int | None) -> dict[str, float]:
    (folder / "number.txt").write_text(str(seed))
    calls.append(seed)
    if steps == 13:
        raise KeyboardInterrupt
    return {"number": float(seed)}


@pytest.fixture(autouse=True)
def number_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(commands.MODELS, "number", f"{__name__}:write_number")
    calls.clear()


def test_a_finished_model_is_kept_and_other_settings_train_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["number", "--out", str(tmp_path)]
    assert train_tiny_main([*flags, "--seed", "3"]) == train_tiny_main([*flags, "--seed", "3"]) == 0
    assert calls == [3] and "number 3" in capsys.readouterr().out
    record = json.loads((tmp_path / "number/start.json").read_text())
    assert record["figures"] == {"number": 3.0} and record["settings"]["seed"] == 3
    assert train_tiny_main([*flags, "--seed", "4"]) == 0
    assert calls == [3, 4] and (tmp_path / "number/number.txt").read_text() == "4"


def test_a_stopped_training_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    assert train_tiny_main(["number", "--out", str(tmp_path), "--steps", "13"]) == 130
    assert not list(tmp_path.iterdir())
    (tmp_path / ".number-unfinished").mkdir()  # as a killed process leaves it
    assert train_tiny_main(["number", "--out", str(tmp_path)]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["number"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny_main(["nonsense", "--out", str(tmp_path)]) == 2
    assert "nonsense is not a start weight: choose from" in capsys.readouterr().err
    (tmp_path / "number").mkdir()
    assert train_tiny_main(["number", "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err and not calls
