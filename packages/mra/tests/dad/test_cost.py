"""The arithmetic of the cost table; the counts themselves take minutes and are printed by `python -m mra.dad.cost`."""

import pytest

from mra.dad.cost import CAPTIONS, KEPT, PEAKS, Stage, count, pose_flop, table
from mra.dad.options import VARIANTS


def test_hours_follow_from_items_arithmetic_and_share() -> None:
    peak = PEAKS["A100 (bf16)"]
    stage = Stage("generate", "picture", 3600, 2 * peak * 1e12 * 0.5)  # two seconds each at half the peak
    rows = table([stage, stage], share=0.5).splitlines()
    assert rows[2].split("|")[1].strip() == "generate" and "3,600 pictures" in rows[2]
    assert [cell.strip() for cell in rows[2].split("|")][5] == "2.0"
    assert [cell.strip() for cell in rows[-1].split("|")][5] == "4"


def test_number_of_pictures_is_the_published_one() -> None:
    assert CAPTIONS * VARIANTS == 1_362_520
    assert round(CAPTIONS * VARIANTS * KEPT) == pytest.approx(1_217_750, abs=100)


def test_products_are_counted_on_networks_without_weights() -> None:
    import torch

    with torch.device("meta"):
        layer = torch.nn.Linear(30, 50)
        assert count(lambda: layer(torch.zeros(7, 30))) == 2 * 7 * 30 * 50
    # ViTPose base: about 17 GMAC by its authors.
    assert pose_flop() / 2e9 == pytest.approx(17, rel=0.1)
