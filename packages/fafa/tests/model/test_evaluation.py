"""Similarity and the metrics of several k against naive forms."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fafa.evaluation import batchwise_similarity, rank, retrieval, sweep, topk_mean_similarity
from tbps_common.errors import InputError


def features(queries: int = 9, images: int = 37, tokens: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(queries, width, generator=generator), dim=1)
    return query, normalize(torch.randn(images, tokens, width, generator=generator), dim=2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 11, 32])
def test_similarity_is_the_mean_of_the_largest(tokens: int) -> None:
    query, gallery = features(tokens=tokens)
    naive = batchwise_similarity(query, gallery, batch_size=4)
    torch.testing.assert_close(naive, torch.einsum("qd,gtd->qgt", query, gallery))
    for k in sorted({1, 2, 3, tokens} & set(range(1, tokens + 1))):
        mean = topk_mean_similarity(query, gallery, k)
        torch.testing.assert_close(mean, naive.topk(k).values.mean(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_chunks_do_not_change_the_similarity(k: int) -> None:
    query, gallery = features()
    whole = topk_mean_similarity(query, gallery, k)
    torch.testing.assert_close(topk_mean_similarity(query, gallery, k, chunk_size=2), whole, atol=1e-6, rtol=0)
    naive = torch.einsum("qd,gtd->qgt", query, gallery).topk(min(k, 5)).values.mean(-1)
    torch.testing.assert_close(whole, naive, atol=1e-6, rtol=0)


def test_the_sweep_is_the_evaluation_at_every_k(caplog: pytest.LogCaptureFixture) -> None:
    query, gallery = features(queries=40, images=50)
    g_ids = torch.arange(50) % 20 - 1
    q_ids = torch.arange(40) % 23  # ids 19..22 answer nothing: queries 19..22
    results = sweep(query, gallery, q_ids, g_ids, [5, 1, 3])
    assert list(results) == [1, 3, 5]
    for k, result in results.items():
        similarity = batchwise_similarity(query, gallery).topk(k).values.mean(-1)
        found = q_ids < 19
        cmc, mean_ap, _, _ = rank(similarity[found], q_ids[found], g_ids)
        share = int(found.sum()) / 40  # a query without a match counts as never found
        assert result.metrics["R1"] == pytest.approx(cmc[0].item() * share, abs=1e-4)
        assert result.metrics["mAP"] == pytest.approx(mean_ap.item() * share, abs=1e-4)
        assert result.num_missing == 4 and result.indices is None
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fafa.evaluation"):
        retrieval(query, gallery, q_ids, g_ids, 3)
    assert caplog.text.count("4 of 40 queries have no match") == 1


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
