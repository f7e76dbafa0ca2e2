"""What the camera adds to a person: place, facing, scenery, light, an occluder, and noise."""

from dataclasses import dataclass

import numpy as np

from tbps_world.synth.body import BACKGROUND, LOWER, UPPER
from tbps_world.synth.palette import toned
from tbps_world.synth.raster import SUBPIXELS, Canvas, Colour

FACINGS = ("front", "back", "right", "left")
"""Facing of view 0, 1, 2, ...: everybody has at least a front and a back view."""


@dataclass(frozen=True)
class View:
    """Parameters of one picture of one person. Shares are in thousandths of the picture's side.

    Attributes:
        facing: one of `FACINGS`.
        camera: number of the scenery.
        scale: size of the figure in thousandths of the largest, 850 to 1000.
        shift_x: sideways offset of the figure, -60 to 60.
        shift_y: downwards offset of the figure, -60 to 60 (less where the figure would leave the picture).
        lean: sideways offset of the head in figure units.
        stride: walking phase, -3 to 3.
        gain: exposure in 256ths, 192 to 307.
        cast: offset of red, green and blue, -6 to 6.
        occluder: None, or ("pole" or "box", place from 0 to 999).
    """

    facing: str
    camera: int
    scale: int
    shift_x: int
    shift_y: int
    lean: int
    stride: int
    gain: int
    cast: tuple[int, int, int]
    occluder: tuple[str, int] | None


def sample_view(index: int, generator: np.random.Generator) -> View:
    """Draw the parameters of the view with this index; facing and camera follow the index."""

    def between(low: int, high: int) -> int:
        return int(generator.integers(low, high + 1))

    scale, shift_x, shift_y = between(850, 1000), between(-60, 60), between(-60, 60)
    lean, stride = between(-28, 28), between(-3, 3)
    # The sum of two uniform steps: extreme exposures are rare.
    gain = 192 + between(0, 57) + between(0, 58)
    cast = (between(-6, 6), between(-6, 6), between(-6, 6))
    hidden, kind, place = between(0, 9) == 0, between(0, 1), between(0, 999)
    return View(
        facing=FACINGS[index % len(FACINGS)],
        camera=index,
        scale=scale,
        shift_x=shift_x,
        shift_y=shift_y,
        lean=lean,
        stride=stride,
        gain=gain,
        cast=cast,
        occluder=(("pole", "box")[kind], place) if hidden else None,
    )


@dataclass(frozen=True)
class _Scenery:
    wall: Colour
    floor: Colour
    horizon: int
    pattern: str


_SCENERIES = (
    _Scenery((168, 174, 180), (134, 130, 124), 66, "panels"),
    _Scenery((152, 140, 126), (120, 118, 116), 60, "bricks"),
    _Scenery((140, 158, 150), (150, 144, 130), 72, "hedge"),
    _Scenery((182, 172, 158), (112, 116, 122), 62, "columns"),
    _Scenery((150, 160, 176), (142, 140, 146), 70, "windows"),
    _Scenery((160, 150, 160), (128, 134, 126), 64, "plain"),
)


def draw_scenery(canvas: Canvas, camera: int) -> int:
    """Paint wall and floor over the whole canvas and return the ink for the shadow under the figure."""
    scenery = _SCENERIES[camera % len(_SCENERIES)]
    height, width = canvas.height, canvas.width
    wall, floor = canvas.mix(scenery.wall, BACKGROUND), canvas.mix(scenery.floor, BACKGROUND)
    dark, pale = canvas.mix(toned(scenery.wall, 86), BACKGROUND), canvas.mix(toned(scenery.wall, 110), BACKGROUND)
    joint = canvas.mix(toned(scenery.floor, 90), BACKGROUND)
    horizon = height * scenery.horizon // 100
    canvas.inks[:horizon] = wall
    canvas.inks[horizon:] = floor
    unit = max(2, width // 64)
    thin = max(1, unit // 2)
    if scenery.pattern == "panels":
        for x in range(width // 6, width, width // 3):
            canvas.inks[:horizon, x : x + thin] = dark
        canvas.inks[horizon - 3 * unit : horizon] = dark
    elif scenery.pattern == "bricks":
        course = 6 * unit
        for row, y in enumerate(range(0, horizon, course)):
            canvas.inks[y : y + thin] = dark
            for x in range((row % 2) * course, width, 2 * course):
                canvas.inks[y : min(y + course, horizon), x : x + thin] = dark
    elif scenery.pattern == "hedge":
        canvas.inks[horizon * 55 // 100 : horizon] = dark
        canvas.inks[horizon * 55 // 100 : horizon * 57 // 100] = pale
    elif scenery.pattern == "columns":
        for x in range(0, width, width // 2):
            canvas.inks[:horizon, x : x + width // 8] = pale
            canvas.inks[:horizon, x + width // 8 : x + width // 8 + unit] = dark
    elif scenery.pattern == "windows":
        for x in (width // 10, width * 6 // 10):
            canvas.inks[horizon // 8 : horizon * 6 // 10, x : x + width * 3 // 10] = pale
            canvas.inks[horizon * 3 // 10 : horizon * 3 // 10 + thin, x : x + width * 3 // 10] = dark
    for y in range(horizon + 5 * unit, height, 9 * unit):
        canvas.inks[y : y + thin] = joint
    return canvas.mix(toned(scenery.floor, 68), BACKGROUND)


def occluder_box(view: View, parts: np.ndarray) -> tuple[slice, slice]:
    """Return rows and columns of the occluder.

    It covers at most 15 % of the figure, and at most 35 % of the upper and of the lower garment, which every picture
    has to show.

    Args:
        view: the view, with an occluder.
        parts: `[height, width]` uint8, the parts before anything is laid over them.
    """
    height, width = parts.shape
    kind, place = view.occluder or ("pole", 0)
    masks = [(parts != BACKGROUND, 15), (parts == UPPER, 35), (parts == LOWER, 35)]
    limits = [(mask, int(mask.sum()) * percent // 100) for mask, percent in masks]
    if kind == "pole":
        start = width * (250 + place // 2) // 1000
        rows, columns = slice(0, height), slice(start, start + max(2, width * 7 // 100))
    else:
        left = width * (place % 3) // 8
        rows, columns = slice(height * (760 + place // 8) // 1000, height), slice(left, left + width * 6 // 10)
    while any(int(mask[rows, columns].sum()) > limit for mask, limit in limits):
        if kind == "pole":
            columns = slice(columns.start, columns.stop - 1)
        else:
            rows = slice(rows.start + max(1, height // 64), rows.stop)
    return rows, columns


def exposed(colours: np.ndarray, parts: np.ndarray, view: View, generator: np.random.Generator) -> np.ndarray:
    """Average 2x2 drawn pixels, then apply texture, light and noise.

    Args:
        colours: `[2 * height, 2 * width, 3]` uint8.
        parts: `[height, width]` uint8 of the final picture; texture is laid on the background only.
        view: exposure and cast.
        generator: source of texture and noise.

    Returns:
        `[height, width, 3]` uint8.
    """
    height, width = parts.shape
    wide = colours.astype(np.int32)
    picture = (wide[0::2, 0::2] + wide[1::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 1::2] + 2) >> 2
    cell = max(1, width // 24)
    coarse = generator.integers(-7, 8, size=(height // cell + 1, width // cell + 1), dtype=np.int32)
    texture = coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    picture += np.where(parts == BACKGROUND, texture, 0)[:, :, None]
    picture = (picture * view.gain + 128) >> 8
    picture += np.array(view.cast, dtype=np.int32)
    # The sum of four uniform bytes has a standard deviation of 147.8; 83 / 4096 brings it to 3.
    uniform = generator.integers(0, 256, size=(4, height, width, 3), dtype=np.uint8)
    picture += ((uniform.sum(axis=0, dtype=np.int32) - 510) * 83 + 2048) >> 12
    return picture.clip(0, 255).astype(np.uint8)


def figure_place(view: View, height: int, width: int) -> tuple[int, int, int]:
    """Return the figure's height, middle and top in sixteenths of a pixel of a canvas of this size.

    A figure with a hat reaches 30 thousandths of its height above its top: both ends stay inside the picture.
    """
    tall = height * SUBPIXELS * 900 // 1000 * view.scale // 1000
    middle = width * SUBPIXELS // 2 + width * SUBPIXELS * view.shift_x // 1000
    slack = height * SUBPIXELS - tall
    top = slack * 55 // 100 + height * SUBPIXELS * view.shift_y // 1000
    lowest = slack - height * SUBPIXELS * 12 // 1000
    return tall, middle, min(max(top, tall * 35 // 1000), lowest)
