"""The filter's judgements: colour statistics against plain loops, key points case by case."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mra.dad.filter import FEW_KEYPOINTS, GREYSCALE, SMALL_PERSON, WRONG_ORDER, chroma, judge_colour, judge_pose
from mra.dad.options import build_parser

# COCO key points of a person who stands upright in a picture of height 100.
UPRIGHT = np.array(
    [[25, 10], [23, 8], [27, 8], [20, 9], [30, 9], [15, 25], [35, 25], [12, 40], [38, 40], [11, 52], [39, 52]]
    + [[19, 52], [31, 52], [19, 72], [31, 72], [19, 92], [31, 92]],
    dtype=np.float64,
)


def pose_verdict(points: np.ndarray, scores: np.ndarray, **changes: object) -> str | None:
    limits = {"min_score": 0.3, "min_count": 8, "min_extent": 0.4, **changes}
    return judge_pose(points, scores, 100, **limits)  # type: ignore[arg-type]


def test_chroma_is_the_formula_over_all_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    found = chroma(Image.fromarray(pixels))
    values = [[int(value) for value in pixel] for row in pixels for pixel in row]
    mean = sum(max(pixel) - min(pixel) for pixel in values) / len(values)
    spreads = []
    for one, other in ((0, 1), (1, 2)):
        differences = [pixel[one] - pixel[other] for pixel in values]
        centre = sum(differences) / len(differences)
        spreads.append((sum((value - centre) ** 2 for value in differences) / len(differences)) ** 0.5)
    assert found.mean == pytest.approx(mean)
    assert found.spread == pytest.approx(max(spreads))


def test_greyscale_and_toned_pictures_go_and_coloured_ones_stay(world: Path) -> None:
    defaults = build_parser().parse_args(["filter"])
    limits = defaults.min_chroma, defaults.min_chroma_spread
    pictures = sorted((world / "images/CUHK-PEDES/imgs").rglob("*.png"))
    kept = 0
    for path in pictures:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        grey = picture.convert("L")
        toned = ImageOps.colorize(grey, black=(18, 12, 4), white=(250, 244, 236))
        assert judge_colour(chroma(grey.convert("RGB")), *limits) == GREYSCALE
        assert judge_colour(chroma(toned), *limits) == GREYSCALE
        kept += judge_colour(chroma(picture), *limits) is None
    assert kept >= 0.9 * len(pictures)


def test_upright_person_is_kept() -> None:
    assert pose_verdict(UPRIGHT, np.full(17, 0.9)) is None


def test_too_few_confident_key_points() -> None:
    scores = np.full(17, 0.1)
    scores[:7] = 0.3
    assert pose_verdict(UPRIGHT, scores) == FEW_KEYPOINTS
    scores[7] = 0.3
    assert pose_verdict(UPRIGHT, scores, min_extent=0.3) is None


def test_person_who_fills_too_little() -> None:
    small = UPRIGHT * [1, 0.4]
    assert pose_verdict(small, np.full(17, 0.9)) == SMALL_PERSON
    assert pose_verdict(small, np.full(17, 0.9), min_extent=0.3) is None


def test_person_upside_down() -> None:
    turned = UPRIGHT * [1, -1] + [0, 100]
    scores = np.full(17, 0.9)
    assert pose_verdict(turned, scores) == WRONG_ORDER
    assert pose_verdict(turned, scores, any_order=True) is None
    # What is hidden is not judged: without legs only head and shoulders are compared.
    scores[[0, 1, 2, 3, 4, 5, 6]] = 0.0
    assert pose_verdict(UPRIGHT, scores) is None


def test_nothing_is_asked_for() -> None:
    assert pose_verdict(UPRIGHT, np.zeros(17), min_count=0) is None
