"""The benchmark compares like with like: the direct forms compute the same results."""

import json
import random
from pathlib import Path

import pytest
import torch

from bench_cmlfa import SIZES, direct_masking, direct_metrics, main
from cmlfa.datasets import mask_tokens
from cmlfa.metrics import rank


@pytest.mark.parametrize("seed", range(20))
def test_direct_masking_draws_the_same(seed: int) -> None:
    ids = torch.tensor([49406, *range(500, 530), 49407, 0, 0])
    random.seed(seed)
    expected = mask_tokens(ids)
    random.seed(seed)
    found = direct_masking(ids)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_direct_metrics_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(12, 30, generator=generator)
    q_pids, g_pids = torch.arange(12) % 5, torch.arange(30) % 5
    assert direct_metrics(similarity, q_pids, g_pids) == pytest.approx(
        float(rank(similarity, q_pids, g_pids)[1]), abs=1e-3
    )


def test_the_command_reports_equal_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = {**SIZES["small"]["clip"], "vision_layers": 1, "text_layers": 1}
    monkeypatch.setitem(SIZES, "small", {**SIZES["small"], "clip": clip, "queries": 60, "gallery": 30})
    threads = torch.get_num_threads()
    try:
        assert main(["--batch_size", "2", "--repeats", "1", "--json", str(tmp_path / "bench.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]}
    loss = rows["total loss of the first step"]
    assert loss["ours"] == pytest.approx(loss["direct"], rel=1e-4)
    assert rows["mAP"]["ours"] == pytest.approx(rows["mAP"]["direct"], abs=1e-3)
    work = rows["forward GFLOP per pair"]
    assert work["direct"] > 1.2 * work["ours"]
    assert rows["optimizer groups"]["ours"] == 4
    assert "training step, ms" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--repeats", "-1"]])
def test_unusable_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert flags[0] in capsys.readouterr().err
