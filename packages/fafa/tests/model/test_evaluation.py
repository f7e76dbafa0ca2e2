"""Similarity and the sweep over k against naive forms."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fafa.evaluation import batchwise_similarity, retrieval, sweep, topk_mean_similarity, topk_means
from tbps_common.errors import InputError


def features(queries: int = 9, images: int = 37, tokens: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(queries, width, generator=generator), dim=1)
    return query, normalize(torch.randn(images, tokens, width, generator=generator), dim=2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 11, 32])
def test_one_sorting_pass_gives_the_means_of_every_k(tokens: int) -> None:
    query, gallery = features(tokens=tokens)
    ks = sorted({1, 2, 3, tokens} & set(range(1, tokens + 1)))
    expected = torch.einsum("qd,gtd->qgt", query, gallery).sort(dim=-1, descending=True).values
    for k, mean in zip(ks, topk_means(query, gallery, ks)):
        torch.testing.assert_close(mean, expected[..., :k].mean(-1), atol=1e-6, rtol=0)
        torch.testing.assert_close(topk_mean_similarity(query, gallery, k), mean, atol=1e-6, rtol=0)


def test_means_over_several_blocks_of_images() -> None:
    query, gallery = features(queries=700, images=60)  # 11 images at a time
    naive = batchwise_similarity(query, gallery, batch_size=64)
    for k, mean in zip((2, 4), topk_means(query, gallery, (2, 4))):
        torch.testing.assert_close(mean, naive.topk(k).values.mean(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_chunks_do_not_change_the_similarity(k: int) -> None:
    query, gallery = features()
    whole = topk_mean_similarity(query, gallery, k)
    torch.testing.assert_close(topk_mean_similarity(query, gallery, k, chunk_size=2), whole, atol=1e-6, rtol=0)
    naive = torch.einsum("qd,gtd->qgt", query, gallery).topk(min(k, 5)).values.mean(-1)
    torch.testing.assert_close(whole, naive, atol=1e-6, rtol=0)


def test_the_sweep_is_the_evaluation_at_every_k(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    query, gallery = features(queries=40, images=50)
    g_ids = torch.arange(50) % 20 - 1
    q_ids = torch.arange(40) % 23  # ids 19..22 answer nothing: queries 19..22
    monkeypatch.setattr("fafa.evaluation._SWEEP_BYTES", 4 * 3 * 50 * 7)  # seven queries at a time
    with caplog.at_level(logging.WARNING, "fafa.evaluation"):
        results = sweep(query, gallery, q_ids, g_ids, [5, 1, 3])
    assert list(results) == [1, 3, 5] and caplog.text.count("no match") == 1
    for k, result in results.items():
        alone = retrieval(query, gallery, q_ids, g_ids, k)
        assert result.metrics == pytest.approx(alone.metrics, abs=1e-9)
        assert torch.equal(result.first_rank, alone.first_rank) and torch.equal(result.cmc, alone.cmc)
        assert result.num_missing == alone.num_missing == 4


def test_the_best_token_alone_is_k_of_one() -> None:
    query, gallery = features()
    ids = torch.arange(37) % 9
    hard = retrieval(query, gallery, torch.arange(9), ids, k=4, soft=False)
    assert hard.metrics == retrieval(query, gallery, torch.arange(9), ids, k=1).metrics


@pytest.mark.parametrize("k", [0, 6])
def test_more_tokens_than_there_are_is_an_input_error(k: int) -> None:
    query, gallery = features()
    ids = torch.arange(37) % 9
    with pytest.raises(InputError, match=f"--fda-k {k}.*5"):
        retrieval(query, gallery, torch.arange(9), ids, k)
    with pytest.raises(ValueError, match=f"--fda-k {k}.*5"):
        sweep(query, gallery, torch.arange(9), ids, [2, k])
