"""The rasteriser against a test of every pixel centre."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbps_world.synth.raster import SUBPIXELS, Canvas
from tbps_world.synth.sketch import Sketch

SIZE = 12
COORDINATES = st.integers(-3 * SUBPIXELS, (SIZE + 3) * SUBPIXELS)
POINTS = st.tuples(COORDINATES, COORDINATES)


def painted(canvas: Canvas) -> np.ndarray:
    return canvas.inks == 1


def new_canvas() -> Canvas:
    canvas = Canvas(SIZE, SIZE)
    canvas.mix((0, 0, 0), 0)
    canvas.mix((255, 255, 255), 1)
    return canvas


def centres() -> list[tuple[int, int, int, int]]:
    half = SUBPIXELS // 2
    return [
        (row, column, column * SUBPIXELS + half, row * SUBPIXELS + half)
        for row in range(SIZE)
        for column in range(SIZE)
    ]


@settings(max_examples=150, deadline=None)
@given(POINTS, POINTS, POINTS)
def test_a_triangle_covers_the_centres_between_its_sides(a, b, c) -> None:
    canvas = new_canvas()
    canvas.polygon((a, b, c), 1)
    for row, column, x, y in centres():
        # The sides that cross this row, met at the integer at or below the exact crossing.
        crossings = [
            Fraction((y - y1) * (x2 - x1), y2 - y1).__floor__() + x1
            for (x1, y1), (x2, y2) in ((a, b), (b, c), (c, a))
            if min(y1, y2) <= y < max(y1, y2)
        ]
        inside = bool(crossings) and min(crossings) <= x < max(crossings)
        assert painted(canvas)[row, column] == inside


@settings(max_examples=100, deadline=None)
@given(POINTS, st.integers(-20, 120), st.integers(-20, 120))
def test_an_ellipse_covers_the_centres_inside_it(centre, rx, ry) -> None:
    canvas = new_canvas()
    canvas.ellipse(centre, rx, ry, 1)
    for row, column, x, y in centres():
        dx, dy = x - centre[0], y - centre[1]
        value = (dx * ry) ** 2 + (dy * rx) ** 2 if rx > 0 and ry > 0 else None
        # One sixteenth of a pixel on the border may fall either way: the right end is open.
        if value is None or (abs(dx) - 1) > 0 and ((abs(dx) - 1) * ry) ** 2 + (dy * rx) ** 2 > (rx * ry) ** 2:
            assert not painted(canvas)[row, column]
        elif ((abs(dx) + 1) * ry) ** 2 + (dy * rx) ** 2 < (rx * ry) ** 2:
            assert painted(canvas)[row, column]


def test_over_paints_only_where_the_named_inks_are() -> None:
    canvas = new_canvas()
    third = canvas.mix((9, 9, 9), 2)
    left = [(0, 0), (6 * SUBPIXELS, 0), (6 * SUBPIXELS, SIZE * SUBPIXELS), (0, SIZE * SUBPIXELS)]
    canvas.polygon(left, 1)
    canvas.polygon([(0, 0), (SIZE * SUBPIXELS, 0), (SIZE * SUBPIXELS, 32), (0, 32)], third, over=(1,))
    assert (
        (canvas.inks[:2, :6] == third).all() and (canvas.inks[:2, 6:] == 0).all() and (canvas.inks[2:, :6] == 1).all()
    )


def test_colours_and_parts_are_looked_up_by_ink() -> None:
    canvas = new_canvas()
    canvas.inks[3, 4] = 1
    colours, parts = canvas.finished()
    assert (
        colours.shape == (SIZE, SIZE, 3)
        and colours[3, 4].tolist() == [255, 255, 255]
        and colours[0, 0].tolist() == [0, 0, 0]
    )
    assert parts[3, 4] == 1 and parts.sum() == 1


def test_a_canvas_holds_256_inks() -> None:
    canvas = Canvas(2, 2)
    assert [canvas.mix((1, 2, 3), 0) for _ in range(256)] == list(range(256))
    with pytest.raises(ValueError, match="256"):
        canvas.mix((1, 2, 3), 0)


def test_a_mirrored_sketch_paints_the_mirror_image() -> None:
    painted_maps = []
    for mirrored in (False, True):
        canvas = Canvas(64, 64)
        canvas.mix((0, 0, 0), 0)
        canvas.mix((1, 1, 1), 1)
        sketch = Sketch(canvas, 60 * SUBPIXELS, 32 * SUBPIXELS, 2 * SUBPIXELS, mirrored=mirrored)
        sketch.limb(((-100, 100, 40), (200, 500, 60), (300, 800, 30)), 1)
        sketch.dome(-200, 400, 100, 80, 1)
        painted_maps.append(canvas.inks)
    # Floor division rounds both ways to the left, so a border pixel may differ.
    assert (painted_maps[0] != painted_maps[1][:, ::-1]).mean() < 0.02
    assert painted_maps[0].sum() > 200
