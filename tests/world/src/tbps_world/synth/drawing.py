"""One picture: scenery, person, occluder, light; with its segmentation map and the list of what can be seen."""

from dataclasses import dataclass

import numpy as np

from tbps_world.synth.attributes import ABSENT, Person
from tbps_world.synth.body import (
    ACCESSORY,
    BACKGROUND,
    BAG,
    HAIR_PART,
    HEAD,
    HEADWEAR,
    LOWER,
    PARTS,
    SHOES,
    UPPER,
    mix_paints,
)
from tbps_world.synth.camera import View, draw_scenery, exposed, figure_place, occluder_box
from tbps_world.synth.frontal import draw_frontal
from tbps_world.synth.profile import draw_profile
from tbps_world.synth.raster import Canvas
from tbps_world.synth.sketch import Sketch

Box = tuple[int, int, int, int]

_REFERENCE_AREA = 128 * 64
_LEAST_PIXELS = {HAIR_PART: 16, HEAD: 24, UPPER: 120, LOWER: 70, SHOES: 20, BAG: 28, HEADWEAR: 18, ACCESSORY: 6}
"""Pixels of a part, in a picture of 128 x 64, from which on a caption may speak of it."""

_LEAST_SHARE = 60
"""Percentage of a part that an occluder must leave for a caption to speak of it."""


@dataclass(frozen=True)
class Seen:
    """What one picture shows.

    Attributes:
        visible: names of the attributes a caption may state.
        boxes: for each part with a visible pixel its tight extent (x1, y1, x2, y2), half-open, in pixels.
        pixels: for each part with a visible pixel the number of its pixels.
    """

    visible: frozenset[str]
    boxes: dict[str, Box]
    pixels: dict[str, int]


@dataclass(frozen=True)
class Drawing:
    """A picture `[height, width, 3]` uint8, its part numbers `[height, width]` uint8, and what it shows."""

    picture: np.ndarray
    parts: np.ndarray
    seen: Seen


def draw(person: Person, view: View, height: int, width: int, generator: np.random.Generator) -> Drawing:
    """Draw one picture of a person.

    Args:
        person: who.
        view: from where and how.
        height: pixels of the finished picture.
        width: pixels of the finished picture.
        generator: source of texture and noise.
    """
    canvas = Canvas(2 * height, 2 * width)
    shadow = draw_scenery(canvas, view.camera)
    outline = canvas.mix((52, 50, 54), BACKGROUND)
    tall, middle, top = figure_place(view, canvas.height, canvas.width)
    sketch = Sketch(canvas, tall, middle, top, view.lean, mirrored=view.facing == "left")
    sketch.oval(10, 988, 200, 26, shadow)
    paints = mix_paints(canvas, person)
    if view.facing in ("front", "back"):
        draw_frontal(sketch, person, paints, view.stride, back=view.facing == "back")
    else:
        draw_profile(sketch, person, paints, view.stride, right_side=view.facing == "right")
    _draw_outline(canvas, outline)
    free = np.array(canvas.parts, dtype=np.uint8)[canvas.inks]
    if view.occluder is not None:
        canvas.inks[occluder_box(view, free)] = canvas.mix((112, 106, 96), BACKGROUND)
    colours, parts = canvas.finished()
    # One of the four drawn pixels stands for all: a part number cannot be averaged.
    parts = np.ascontiguousarray(parts[::2, ::2])
    picture = exposed(colours, parts, view, generator)
    return Drawing(picture, parts, _look(person, view, parts, free[::2, ::2]))


def _draw_outline(canvas: Canvas, ink: int) -> None:
    """Darken the background along the figure, so that it stands out from a wall of its own colour."""
    figure = np.array(canvas.parts, dtype=np.uint8)[canvas.inks] != BACKGROUND
    near = figure.copy()
    near[1:] |= figure[:-1]
    near[:-1] |= figure[1:]
    near[:, 1:] |= figure[:, :-1]
    near[:, :-1] |= figure[:, 1:]
    canvas.inks[near & ~figure] = ink


def _look(person: Person, view: View, parts: np.ndarray, free: np.ndarray) -> Seen:
    """List what the finished picture shows; `free` holds the parts before the occluder was laid over them."""
    height, width = parts.shape
    counts = np.bincount(parts.ravel(), minlength=len(PARTS))
    before = np.bincount(free.ravel(), minlength=len(PARTS))
    boxes: dict[str, Box] = {}
    pixels: dict[str, int] = {}
    for part in range(1, len(PARTS)):
        if counts[part] == 0:
            continue
        mask = parts == part
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes[PARTS[part]] = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        pixels[PARTS[part]] = int(counts[part])

    def shown(part: int) -> bool:
        least = _LEAST_PIXELS[part] * height * width // _REFERENCE_AREA
        return bool(counts[part] >= max(4, least) and 100 * counts[part] >= _LEAST_SHARE * before[part])

    visible = {"gender", "build"}
    if view.facing != "back" and shown(HEAD):
        visible.add("age")
    if person.hair_length == "bald":
        if shown(HEAD) and person.headwear_type == ABSENT:
            visible.add("hair_length")
    elif shown(HAIR_PART):
        visible |= {"hair_length", "hair_colour"}
    for part, attributes in (
        (UPPER, ("upper_type", "upper_colour")),
        (LOWER, ("lower_type", "lower_colour")),
        (SHOES, ("shoes_type", "shoes_colour")),
        (BAG, ("bag_type", "bag_colour")),
        (HEADWEAR, ("headwear_type", "headwear_colour")),
        (ACCESSORY, ("accessory",)),
    ):
        if shown(part):
            visible.update(attributes)
    return Seen(frozenset(visible), boxes, pixels)
