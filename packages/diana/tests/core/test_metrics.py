"""Metrics of a score matrix against stored numbers and against a loop over queries."""

from typing import Any

import pytest
import torch

from diana.metrics import metric_eval
from tbps_common.errors import InputError


def by_loop(sim: list[list[float]], image_pids: list[int], text_pids: list[int]) -> dict[str, float]:
    hits, precisions, firsts = {1: 0, 5: 0, 10: 0}, [], []
    for row, pid in zip(sim, text_pids):
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        ranks = [place for place, column in enumerate(order, start=1) if image_pids[column] == pid]
        if not ranks:
            continue
        for k in hits:
            hits[k] += ranks[0] <= k
        precisions.append(sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ranks))
        firsts.append(ranks[0] - 1)
    count = len(firsts)
    rates = {f"r{k}": 100 * value / count for k, value in hits.items()}
    return {**rates, "mAP": 100 * sum(precisions) / count, "mfr": sum(firsts) / count}


@pytest.mark.golden("diana", kind="metrics")
def test_stored_metrics(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    inputs = case.tensors("inputs.safetensors")
    found = metric_eval(inputs["sim"], inputs["image_pids"], inputs["text_pids"])
    tolerance = case.case["tolerance"]
    for name, expected in case.case["expected"].items():
        assert found[name] == pytest.approx(expected, rel=tolerance["rtol"], abs=tolerance["atol"])


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_a_loop_with_ties_and_missing_persons(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(seed)
    sim = torch.randint(0, 6, (17, 23), generator=generator).float() / 5 - 0.5
    image_pids = torch.randint(0, 8, (23,), generator=generator)
    text_pids = torch.randint(0, 9, (17,), generator=generator)
    text_pids[0] = 99
    found = metric_eval(sim, image_pids, text_pids)
    assert found == pytest.approx(by_loop(sim.tolist(), image_pids.tolist(), text_pids.tolist()))
    assert len(caplog.records) == 1 and "are left out" in caplog.text


def test_a_perfect_ranking() -> None:
    found = metric_eval(torch.eye(4), torch.arange(4), torch.arange(4))
    assert found == {"r1": 100.0, "r5": 100.0, "r10": 100.0, "mAP": 100.0, "mfr": 0.0}


def test_unusable_matrices() -> None:
    with pytest.raises(ValueError, match="None of the 2 queries"):
        metric_eval(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\[3, 3\]"):
        metric_eval(torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="NaN"):
        metric_eval(torch.full((1, 1), torch.nan), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
