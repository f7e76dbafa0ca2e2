"""The benchmark compares like with like, and says so."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from bench_fafa import main
from bench_fafa_direct import (
    direct_dispersion,
    direct_evaluation_similarity,
    direct_metrics,
    direct_token_similarity,
)
from bench_fafa_forms import compared
from fafa.evaluation import rank, topk_mean_similarity
from fafa.losses import FeatureDispersionLoss, token_similarity

TINY = (
    "--batch-size 4 --image-size 28 --vit-width 64 --vit-depth 1 --qformer-width 64 --qformer-depth 1 --query-tokens 8 "
    "--embed-dim 16 --queries 12 --gallery 30 --repeats 1"
).split()


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(7, 6, generator=generator), dim=-1)
    return query, normalize(torch.randn(11, 5, 6, generator=generator), dim=-1)


def test_direct_forms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_fafa_direct.BLOCK", 3)
    query, gallery = features()
    torch.testing.assert_close(direct_token_similarity(query, gallery), token_similarity(query, gallery))
    similarity = topk_mean_similarity(query, gallery, 3)
    torch.testing.assert_close(direct_evaluation_similarity(query, gallery, 3), similarity)
    torch.testing.assert_close(direct_dispersion(gallery, 0.1), FeatureDispersionLoss(0.1)(gallery))
    indices = torch.arange(0, 55, 3)
    torch.testing.assert_close(direct_dispersion(gallery, 0.1, indices), FeatureDispersionLoss(0.1)(gallery, indices))
    q_ids, g_ids = torch.arange(7) % 4, torch.arange(11) % 4
    _, mean_ap, mean_inp, _ = rank(similarity, q_ids, g_ids)
    assert direct_metrics(similarity, q_ids, g_ids) == pytest.approx((mean_ap.item(), mean_inp.item()), abs=1e-3)


def test_results_that_differ_stop_the_benchmark() -> None:
    with pytest.raises(AssertionError, match="FD.*differ by 1"):
        compared("FD", lambda: torch.zeros(2), lambda: torch.ones(2), 1, torch.device("cpu"), 1e-3)


def test_the_command_prints_every_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main([*TINY, "--json", str(tmp_path / "bench.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    printed = capsys.readouterr().out
    assert len(rows) == 5 and all(row["what"] in printed for row in rows)
    assert all(row["direct"] > 0 and row["ours"] > 0 and 0 <= row["difference"] <= 1e-2 for row in rows)


@pytest.mark.parametrize(
    "flags", [["--batch-size", "1"], ["--repeats", "0"], ["--image-size", "30"], ["--vit-width", "100"]]
)
def test_unusable_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_a_gpu_that_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err


def test_full_size_figures_on_a_small_stand_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code path of `--full-size` with the paper's model replaced by a small one; the figures are not looked at."""
    from dataclasses import replace

    import bench_fafa_model as model

    paper = model.settings_of

    def small(args: object) -> object:
        settings = paper(args)  # type: ignore[arg-type]
        sizes = replace(settings.qformer, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        return replace(
            settings, image_size=28, vit_width=64, vit_depth=1, vit_heads=2, qformer=sizes, num_query_token=8
        )

    monkeypatch.setattr(model, "settings_of", small)
    monkeypatch.setattr(model, "BERT_WORDS", 40)
    flags = "--full-size --device cpu --batch-size 2 --queries 5 --gallery 9 --repeats 1".split()
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "training step, images/s" in printed and "gallery encoding, images/s" in printed
