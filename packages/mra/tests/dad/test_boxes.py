"""Boxes: normalisation, the filter's reasons, and that the training accepts what is kept."""

import numpy as np
import pytest

from mra.dad.regions import NO_PHRASE, REPEATED, TOO_SMALL, centre_form, filter_boxes, intersection_over_union
from mra.data.regions import box_in_pixels

SIZE = (256, 384)


def kept(boxes: list[list[float]], phrases: list[str], scores: list[float] | None = None, **limits: float) -> tuple:
    scores = [0.9 - 0.1 * number for number in range(len(boxes))] if scores is None else scores
    return filter_boxes(boxes, scores, phrases, SIZE, **{"min_side": 0.02, "overlap": 0.8, **limits})


def test_corners_in_pixels_become_centres_and_shares() -> None:
    found, removed = kept([[64, 96, 192, 384]], ["a man"], [0.123456])
    assert found == {"boxes": [[0.5, 0.625, 0.5, 0.75]], "logits": [0.1235], "phrases": ["a man"]}
    assert removed == []


def test_four_decimals() -> None:
    assert centre_form((0.1, 0.2, 0.43333333, 0.99999)) == [0.2667, 0.6, 0.3333, 0.8]


def test_boxes_are_clipped_to_the_picture() -> None:
    found, _ = kept([[-100, -50, 128, 1000]], ["a man"])
    assert found["boxes"] == [[0.25, 0.5, 0.5, 1.0]]


def test_reasons_of_removal_and_order_by_score() -> None:
    boxes = [[0, 0, 100, 100], [0, 0, 101, 100], [0, 0, 101, 100], [10, 10, 12, 300], [0, 0, 200, 200]]
    phrases = ["a bag", "a bag", "a red bag", "a shoe", ""]
    found, removed = kept(boxes, phrases, [0.5, 0.6, 0.7, 0.9, 0.8])
    assert found["phrases"] == ["a red bag", "a bag"]
    assert found["logits"] == [0.7, 0.6]
    assert removed == [TOO_SMALL, NO_PHRASE, REPEATED]


def test_intersection_over_union_against_counted_cells() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        corners = np.sort(generator.integers(0, 20, (2, 2, 2)), axis=1).reshape(2, 4)
        one, other = (set(_cells(box)) for box in corners)
        expected = len(one & other) / len(one | other) if one | other else 0.0
        found = intersection_over_union(*(tuple(map(float, box)) for box in corners))
        assert found == pytest.approx(expected)


def _cells(box: np.ndarray) -> list[tuple[int, int]]:
    left, top, right, bottom = box
    return [(x, y) for x in range(left, right) for y in range(top, bottom)]


def test_training_accepts_every_box_that_is_kept() -> None:
    generator = np.random.default_rng(2)
    for size in (SIZE, (32, 64), (7, 5)):
        boxes = (generator.random((200, 4)) * 1.4 - 0.2) * [*size, *size]
        phrases = [f"phrase {number}" for number in range(200)]
        found, _ = filter_boxes(boxes.tolist(), [0.5] * 200, phrases, size, min_side=0.0, overlap=0.8)
        assert found["boxes"]
        for box in found["boxes"]:
            pixels = box_in_pixels(tuple(box), *size)
            assert pixels is not None and pixels.w > 0 and pixels.h > 0
