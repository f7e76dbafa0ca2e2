"""The benchmark runs, compares like with like, and its figures are counts and losses that must agree. Never timed."""

import json
from pathlib import Path

import pytest

import bench_dp_gen as bench
from bench_dp_gen import main


def test_both_forms_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    flags = ["--batch_size", "2", "--resolution", "64", "--repeats", "1", "--references", "1", "--json", str(file)]
    flags += ["--rows", "3", "--latency", "0"]
    assert main(flags) == 0
    rows = {row["what"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}
    loss = rows["loss of the first step"]
    assert loss["other"] == pytest.approx(loss["ours"], rel=1e-4)
    flops = rows["forward GFLOP per sample"]
    assert flops["other"] > flops["ours"] > 0  # two of three slots are padding
    assert all(row["other"] > 0 and row["ours"] > 0 for name, row in rows.items() if name.endswith("ms"))
    assert "ratio" in capsys.readouterr().out


def test_a_form_with_another_loss_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench.direct_forward
    monkeypatch.setattr(bench, "direct_forward", lambda *parts: {k: v * 1.01 for k, v in whole(*parts).items()})
    assert main(["--batch_size", "1", "--resolution", "64", "--repeats", "1"]) == 2
    assert "losses of both forms differ" in capsys.readouterr().err


def test_unusable_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--references", "4"]) == 2
    assert "3 slots" in capsys.readouterr().err
