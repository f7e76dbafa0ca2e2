"""The benchmark compares like with like: the direct forms compute the same results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_mra as bench
import bench_mra_direct as bench_direct
from bench_mra import main

TINY: dict[str, Any] = {
    **bench.SMALL,
    "vision_config": {**bench.SMALL["vision_config"], "vision_width": 64, "embed_dim": 8, "depths": [2, 2, 2, 2]},
    "text_config": {**bench.SMALL["text_config"], "hidden_size": 48, "intermediate_size": 96, "vocab_size": 300},
}


def test_the_command_reports_equal_losses_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SMALL", TINY)
    threads = torch.get_num_threads()
    flags = ["--batch_size", "3", "--queries", "5", "--gallery", "7", "--k", "4", "--repeats", "1"]
    try:
        assert main([*flags, "--json", str(tmp_path / "bench.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]}
    assert {name for name, row in rows.items() if row["equal"]} == {
        "total loss of the first step",
        "scores, summed up at random",
        "mAP",
    }
    for row in rows.values():
        if row["equal"]:
            assert row["ours"] == pytest.approx(row["direct"], rel=1e-3)
    assert rows["forward GFLOP per pair"]["direct"] > 1.1 * rows["forward GFLOP per pair"]["ours"]
    assert "training step, ms" in capsys.readouterr().out


def test_a_difference_between_the_forms_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(bench_direct, "map_percent", lambda *_: 1.0)
    assert main(["--batch_size", "2", "--queries", "3", "--gallery", "4", "--k", "2", "--repeats", "1"]) == 1
    assert "the forms disagree in: mAP" in capsys.readouterr().out


def test_the_direct_forms(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 30, generator=generator)
    q_pids, g_pids = torch.arange(12) % 5, torch.arange(30) % 5
    from mra import itm_rerank, retrieval_metrics

    expected = retrieval_metrics(scores, g_pids, q_pids)["mAP"]
    assert bench_direct.map_percent(scores, q_pids, g_pids) == pytest.approx(expected, abs=1e-3)
    net = model("cuhk")
    images = [torch.randn(6, 25, 32, generator=generator) for _ in range(2)]
    text, atts = torch.randn(5, 12, 24, generator=generator), torch.ones(5, 12, dtype=torch.long)
    with torch.no_grad():
        direct = bench_direct.scores(net, scores[:5, :6], images, text, atts, 3)
    ours = itm_rerank(net, scores[:5, :6], images[0], text, atts, 3, images[1], score_world=4)
    torch.testing.assert_close(direct, ours, rtol=1e-4, atol=2e-6)
    idx = torch.tensor([0, 0, 1, 2])
    image_rows, text_rows = bench_direct.draws(net, torch.randn(4, 16, generator=generator), idx)
    assert (idx[image_rows] != idx).all() and (idx[text_rows] != idx).all()


@pytest.mark.parametrize("flags", [["--batch_size", "1"], ["--repeats", "0"], ["--device", "tpu"]])
def test_unusable_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err
