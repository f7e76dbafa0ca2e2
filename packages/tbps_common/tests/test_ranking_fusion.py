"""Two-stage fusion against the formula written out, and against what the released code does on several processes."""

import pytest
import torch

from tbps_common.ranking import evaluate_rows, rerank, rerank_rows, score_rows


def candidates(seed, queries=11, gallery=30, k=6):
    generator = torch.Generator().manual_seed(seed)
    sims = torch.randn(queries, gallery, generator=generator)
    index = sims.topk(k, dim=1).indices
    return sims, index, *(torch.randn(queries, k, generator=generator) * 5 for _ in range(2))


def unit_range(matrix):
    return (matrix - matrix.min()) / (matrix.max() - matrix.min())


def filled(index, itm, gallery):
    matrix = itm.min(dim=1, keepdim=True).values.double().repeat(1, gallery)
    for row in range(len(index)):
        for column, logit in zip(index[row].tolist(), itm[row].tolist()):
            matrix[row, column] = logit
    return matrix


def on_processes(sims, index, itm, weight, world):
    """The released evaluation: every process fills its rows of a matrix of markers, normalises and adds its share."""
    total = torch.zeros(sims.shape, dtype=torch.float64)
    step = len(sims) // world + 1
    for rank in range(world):
        matrix = torch.full(sims.shape, 1000.0, dtype=torch.float64)
        part = slice(rank * step, (rank + 1) * step)
        matrix[part] = filled(index[part], itm[part], sims.shape[1])
        total += unit_range(matrix) + weight * unit_range(sims.double())
    return total


@pytest.mark.parametrize("weight", [0.002, 0.5])
def test_formula(weight):
    sims, index, itm, flip = candidates(1)
    plain = unit_range(filled(index, itm, 30))
    mirrored = unit_range(filled(index, flip, 30))
    first = weight * unit_range(sims.double())
    before = sims.clone()
    fused = rerank(sims, index, itm, weight=weight)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), plain + first, rtol=0, atol=1e-6)
    fused = rerank(sims, index, itm, itm_flip=flip, weight=weight)
    torch.testing.assert_close(fused.double(), (plain + mirrored) / 2 + first, rtol=0, atol=1e-6)
    torch.testing.assert_close(rerank(sims.double(), index, itm, weight=weight), plain + first, rtol=0, atol=1e-12)
    assert torch.equal(sims, before)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_released_result_on_several_processes(world):
    sims, index, itm, _ = candidates(world)
    expected = on_processes(sims, index, itm, 0.002, world) - (world - 1)
    fused = rerank(sims.double(), index, itm, legacy_world_size=world)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)


def test_constant_matrices_become_zero():
    sims, index = torch.full((3, 5), 0.7), torch.tensor([[0, 1]] * 3)
    itm = torch.tensor([[1.0, 2.0]] * 3)
    assert torch.equal(rerank(sims, index, itm)[:, :2], torch.tensor([[0.0, 1.0]] * 3))
    assert torch.equal(rerank(sims, index, torch.ones(3, 2)), torch.zeros(3, 5))


def test_all_columns_may_be_candidates():
    sims, _, _, _ = candidates(5, gallery=7)
    index = torch.arange(7).repeat(11, 1)
    itm = sims * 3 - 1
    torch.testing.assert_close(rerank(sims, index, itm, weight=0.0), unit_range(sims), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row_budget", [1, 400, None])
def test_streamed_fusion_is_the_whole_one(row_budget):
    generator = torch.Generator().manual_seed(8)
    query, gallery = torch.randn(13, 6, generator=generator), torch.randn(40, 6, generator=generator)
    rows = score_rows(query, gallery)
    sims = rows(0, 13)
    index = sims.topk(5, dim=1).indices.int()
    itm = torch.randn(13, 5, generator=generator)
    fused = rerank(sims, index, itm)
    streamed = rerank_rows(rows, 40, index, itm, row_budget=row_budget)
    torch.testing.assert_close(streamed(3, 9), fused[3:9], rtol=0, atol=1e-6)
    ids = torch.arange(40) % 13
    result = evaluate_rows(streamed, torch.arange(13), ids, row_budget=row_budget)
    expected = evaluate_rows(lambda a, b: fused[a:b], torch.arange(13), ids)
    assert result.metrics == expected.metrics
