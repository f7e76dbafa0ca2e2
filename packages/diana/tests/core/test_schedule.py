"""The learning-rate factor against stored series and against its corners."""

import math
from typing import Any

import pytest

from diana.schedule import warmup_decay_gamma
from tbps_common.errors import InputError


@pytest.mark.golden("diana", kind="schedule")
def test_stored_series(golden: Any, golden_name: str) -> None:
    case = golden(golden_name).case
    for series in case["series"]:
        for i, expected in enumerate(series["gamma"]):
            found = warmup_decay_gamma(i, series["total"], series["warmup"], series["type"])
            assert found == pytest.approx(expected, rel=case["tolerance"]["rtol"], abs=case["tolerance"]["atol"])


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("total, warmup", [(100, 10), (10, 0), (5, 50), (1, 1), (2, 2)])
def test_the_factor_rises_to_one_and_falls_to_zero(kind: str, total: int, warmup: int) -> None:
    series = [warmup_decay_gamma(i, total, warmup, kind) for i in range(total + 60)]
    top = max(2, warmup)
    assert series[0] == 0 and all(0 <= value <= 1 for value in series)
    assert series[:top] == sorted(series[:top]) and series[top:] == sorted(series[top:], reverse=True)
    assert series[max(total, top)] == 0 or total <= 1
    if total > top:
        assert series[top] == 1


def test_the_two_rises() -> None:
    assert warmup_decay_gamma(3, 100, 8) == pytest.approx(math.log(4) / math.log(8))
    assert warmup_decay_gamma(3, 100, 8, "linear") == 3 / 8
    with pytest.raises(InputError, match="warmup_type"):
        warmup_decay_gamma(3, 100, 8, "cosine")
