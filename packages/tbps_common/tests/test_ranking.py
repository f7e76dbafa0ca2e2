"""Metrics, tie rule and missing rules against a naive stable sort in float64, for any block size and data."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbps_common.ranking import best_of_rows, evaluate_rows, rank, retrieve
from tbps_common.ranking.metrics import Positives, count_ahead, count_by_slots, read_scores

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def naive(scores, q_pids, g_pids, on_missing="error"):
    """Every metric by the definitions, one query after the other, from a stable sort of the whole row."""
    order = torch.sort(scores.double(), dim=1, descending=True, stable=True).indices
    ap, inp, first = [], [], []
    for row, pid in zip(order.tolist(), q_pids.tolist()):
        ranks = [place + 1 for place, column in enumerate(row) if g_pids[column] == pid]
        if ranks:
            ap.append(sum((m + 1) / r for m, r in enumerate(ranks)) / len(ranks))
            inp.append(len(ranks) / ranks[-1])
            first.append(ranks[0])
        elif on_missing == "miss":
            ap.append(0.0)
            inp.append(0.0)
            first.append(len(g_pids) + 1)
        else:
            ap.append(math.nan)
            inp.append(math.nan)
            first.append(0)
    counted = [query for query in range(len(ap)) if not math.isnan(ap[query])]
    size = len(g_pids)
    cmc = [100 * sum(first[q] <= min(k, size) for q in counted) / len(counted) for k in range(1, 11)]
    metrics = {
        "R1": cmc[0],
        "R5": cmc[4],
        "R10": cmc[9],
        "mAP": 100 * sum(ap[q] for q in counted) / len(counted),
        "mINP": 100 * sum(inp[q] for q in counted) / len(counted),
        "mFR": sum(first[q] - 1 for q in counted) / len(counted),
    }
    return metrics, cmc, ap, inp, first, order


def assert_equals_naive(result, scores, q_pids, g_pids, topk, on_missing="error"):
    metrics, cmc, ap, inp, first, order = naive(scores, q_pids, g_pids, on_missing)
    assert result.metrics == pytest.approx(metrics, abs=1e-9)
    np.testing.assert_allclose(result.cmc[:10], cmc[: len(result.cmc)], rtol=1e-6)
    np.testing.assert_allclose(result.ap, ap, rtol=1e-12)
    np.testing.assert_allclose(result.inp, inp, rtol=1e-12)
    assert result.first_rank.tolist() == first
    assert torch.equal(result.indices, order[:, :topk])
    assert torch.equal(result.scores, scores.gather(1, order[:, :topk]))


def tied_scores(generator, queries, gallery, share=0.3):
    """Normal scores, about `share` of them rounded to a few values, so that they are tied; zeros of both signs."""
    scores = torch.randn(queries, gallery, generator=generator)
    tied = torch.rand(scores.shape, generator=generator) < share
    scores[tied] = (scores[tied] * 2).round() / 2
    return scores


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 70),
    gallery=st.integers(1, 90),
    identities=st.integers(1, 12),
    topk=st.integers(1, 30),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_equals_a_stable_sort_for_every_block_size(device, seed, queries, gallery, identities, topk, share):
    generator = torch.Generator().manual_seed(seed)
    scores = tied_scores(generator, queries, gallery, share)
    g_pids = torch.randint(0, identities, (gallery,), generator=generator) * 7 - 11
    q_pids = g_pids[torch.randint(0, gallery, (queries,), generator=generator)]
    results = []
    for rows_in_block in (1, 7, 64, None):
        result = evaluate_rows(
            lambda start, stop: scores[start:stop].to(device),
            q_pids,
            g_pids,
            topk=topk,
            row_budget=None if rows_in_block is None else rows_in_block * gallery * 4,
        )
        assert_equals_naive(result, scores, q_pids, g_pids, topk)
        results.append(result)
    assert all(result.metrics == results[0].metrics for result in results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("gallery", "identities"), [(20_011, 40), (40_001, 9000), (70_000, 3)])
def test_long_rows(device, gallery, identities):
    # More columns than are searched directly, and more positives than are sorted at once.
    generator = torch.Generator().manual_seed(gallery)
    scores = tied_scores(generator, 5, gallery)
    scores[4] = 0.25  # every column tied
    g_pids = torch.randint(0, identities, (gallery,), generator=generator)
    q_pids = g_pids[torch.randint(0, gallery, (5,), generator=generator)]
    result = evaluate_rows(lambda start, stop: scores[start:stop].to(device), q_pids, g_pids, topk=17)
    assert_equals_naive(result, scores, q_pids, g_pids, 17)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), on_missing=st.sampled_from(["skip", "miss"]), gallery=st.integers(2, 40))
def test_queries_without_a_positive(seed, on_missing, gallery):
    generator = torch.Generator().manual_seed(seed)
    scores = tied_scores(generator, 15, gallery)
    g_pids = torch.randint(0, 5, (gallery,), generator=generator)
    q_pids = torch.randint(0, 9, (15,), generator=generator)
    q_pids[3], q_pids[8] = g_pids[0], -1
    result = evaluate_rows(lambda a, b: scores[a:b], q_pids, g_pids, on_missing=on_missing, row_budget=5 * gallery * 4)
    assert_equals_naive(result, scores, q_pids, g_pids, 10, on_missing)
    assert result.num_missing == int((~torch.isin(q_pids, g_pids)).sum())
    with pytest.raises(ValueError, match=rf"^{result.num_missing} of 15 queries .*first at positions"):
        evaluate_rows(lambda a, b: pytest.fail("scored before the ids were checked"), q_pids, g_pids)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 40), k=st.integers(0, 45))
def test_best_of_rows(seed, rows, columns, k):
    scores = tied_scores(torch.Generator().manual_seed(seed), rows, columns, 0.6)
    before = scores.clone()
    values, indices = best_of_rows(scores, k)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices, order)
    assert torch.equal(values, scores.gather(1, order))
    assert torch.equal(scores, before)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 40), identities=st.integers(1, 9), offset=st.integers(-9, 60))
def test_counting_by_slots_is_counting_by_rows(seed, columns, identities, offset):
    # The accelerator's way runs on CPU too; `offset` places positives in other shards, before and behind the columns.
    generator = torch.Generator().manual_seed(seed)
    block = tied_scores(generator, 8, columns, 0.6)
    g_pids = torch.randint(0, identities, (columns,), generator=generator).numpy()
    bounds, positions = Positives(np.arange(8) % identities, g_pids).of_queries(0, 8)
    scores = read_scores(block, bounds, positions)
    expected = count_ahead(block, bounds, positions - offset, scores)
    assert count_by_slots(block, bounds, positions - offset, scores).tolist() == expected.tolist()


def test_signed_zeros_are_tied():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert best_of_rows(scores, 2)[1].tolist() == [[0, 1]]
    result = evaluate_rows(lambda a, b: scores[a:b], [7], [1, 2, 3, 7])
    assert result.first_rank.tolist() == [4]


def test_mean_first_rank_is_zero_based_and_cmc_is_padded():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    result = evaluate_rows(lambda a, b: scores[a:b], [1, 2], [1, 2, 2], max_rank=5)
    assert result.metrics["mFR"] == pytest.approx(0.5)
    assert result.metrics["R10"] == 100.0
    assert result.cmc.tolist() == [50.0, 100.0, 100.0, 100.0, 100.0]
    missed = evaluate_rows(lambda a, b: scores[a:b], [1, 9], [1, 2, 2], max_rank=5, on_missing="miss")
    assert missed.cmc.tolist() == [50.0] * 5  # its first rank G + 1 = 4 is no hit


def test_topk_zero_and_short_cmc():
    scores = torch.tensor([[0.1, 0.2]])
    result = evaluate_rows(lambda a, b: scores[a:b], [1], [1, 2], topk=0, max_rank=1)
    assert result.indices is None and result.scores is None
    assert result.cmc.tolist() == [0.0] and result.metrics["R5"] == 100.0


def test_rows_of_any_dtype_and_layout():
    generator = torch.Generator().manual_seed(2)
    scores = tied_scores(generator, 12, 30).half()
    q_pids, g_pids = torch.arange(12) % 5, torch.arange(30) % 5
    expected = evaluate_rows(lambda a, b: scores[a:b].float(), q_pids, g_pids)
    transposed = scores.t().contiguous().t()
    for rows in (
        lambda a, b: scores[a:b],
        lambda a, b: scores[a:b].double(),
        lambda a, b: transposed[a:b],
        lambda a, b: scores[a:b].float().requires_grad_(),
    ):
        result = evaluate_rows(rows, q_pids, g_pids, row_budget=5 * 30 * 4)
        assert result.metrics == expected.metrics
        assert torch.equal(result.indices, expected.indices)


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_nothing(threads):
    generator = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(40, 8, generator=generator), torch.randn(301, 9, 8, generator=generator)
    q_pids, g_pids = torch.arange(40) % 7, torch.arange(301) % 7
    one = retrieve(query, gallery, q_pids, g_pids, reduce="topk_mean", k=3)
    torch.set_num_threads(threads)
    try:
        several = retrieve(query, gallery, q_pids, g_pids, reduce="topk_mean", k=3)
    finally:
        torch.set_num_threads(1)
    assert several.metrics == one.metrics
    assert torch.equal(several.indices, one.indices)


def test_rank_transposed_and_unchanged():
    generator = torch.Generator().manual_seed(4)
    scores = tied_scores(generator, 9, 14)
    before = scores.clone()
    q_pids, g_pids = torch.arange(9) % 4, torch.arange(14) % 4
    cmc, mean_ap, mean_inp, indices = rank(scores.t(), g_pids, q_pids)
    metrics, *_, order = naive(scores.t(), g_pids, q_pids)
    assert float(mean_ap) == pytest.approx(metrics["mAP"], rel=1e-6)
    assert float(mean_inp.numpy()) == pytest.approx(metrics["mINP"], rel=1e-6)
    assert (cmc.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(indices, order[:, :10])
    assert torch.equal(rank(scores.t(), g_pids, q_pids, full_indices=True)[3], order)
    assert torch.equal(scores, before)
    misses, _ = rank(scores, [*range(8), 99], list(g_pids) + [], get_mAP=False)
    assert misses[-1] < 100


def test_blocks_keep_the_row_budget():
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return torch.zeros(stop - start, 10)

    evaluate_rows(rows, [0] * 25, [0] * 10, row_budget=10 * 4 * 6)
    assert [start for start, _ in asked] == [0, *itertools.accumulate(stop - start for start, stop in asked)][:-1]
    assert asked[-1][1] == 25
    assert max(stop - start for start, stop in asked) == 6


def out_of_memory(kind):
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
    if kind == "numpy":
        return MemoryError()
    return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ...")


@pytest.mark.parametrize("kind", ["cuda", "numpy", "torch"])
def test_out_of_memory_halves_the_block(kind):
    scores = tied_scores(torch.Generator().manual_seed(6), 50, 40)
    q_pids, g_pids = torch.arange(50) % 8, torch.arange(40) % 8
    expected = evaluate_rows(lambda a, b: scores[a:b], q_pids, g_pids)
    sizes = []

    def rows(start, stop):
        if stop - start > 9:
            raise out_of_memory(kind)
        sizes.append(stop - start)
        return scores[start:stop]

    result = evaluate_rows(rows, q_pids, g_pids)
    assert max(sizes) <= 9 < sum(sizes) == 50
    assert result.metrics == expected.metrics
    assert torch.equal(result.indices, expected.indices)

    def never(start, stop):
        raise out_of_memory(kind)

    with pytest.raises(type(out_of_memory(kind))):
        evaluate_rows(never, q_pids, g_pids)


def test_other_errors_are_not_retried():
    calls = []

    def rows(start, stop):
        calls.append(start)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        evaluate_rows(rows, [1, 1], [1])
    assert calls == [0]


def test_result_reads_as_text_and_table(capfd):
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    result = evaluate_rows(lambda a, b: scores[a:b], [1, 9], [1, 2, 2], on_missing="miss", progress=True)
    assert "2 queries, 1 without a positive" in str(result)
    assert "\n" not in str(result)
    table = result.table()
    assert "|  t2i | 50.000 | 50.000 | 50.000 | 50.000 | 50.000 |" in table.get_string()
    table.add_row(["i2t", 1.0, 2.0, 3.0, 4.0, 5.0])
    assert "|  i2t | 1.000  |" in table.get_string()
    assert "| 1.50 |" in result.table("x", ("R1", "mFR"), decimals=2).get_string()
    with pytest.raises(ValueError, match="R2"):
        result.table(columns=("R2",))
    output = capfd.readouterr()
    assert output.out == "" and "2/2" in output.err
