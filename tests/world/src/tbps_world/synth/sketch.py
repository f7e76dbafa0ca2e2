"""Drawing in figure units: a standing person is 1000 units tall, x = 0 is the middle of the body, y grows downwards."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isqrt

from tbps_world.synth.raster import SUBPIXELS, Canvas, Point

FIGURE_UNITS = 1000

_DOME = ((-100, 0), (-97, 26), (-87, 50), (-71, 71), (-50, 87), (-26, 97), (0, 100))
"""Left half of a semi-ellipse of half-width and height 100, from the base to the top."""


@dataclass
class Sketch:
    """A canvas seen through the place, size, lean and facing of one figure.

    Attributes:
        canvas: where everything is painted.
        height: height of the figure in sixteenths of a pixel.
        centre: x of the figure's middle at the feet, in sixteenths of a pixel.
        top: y of the figure's top, in sixteenths of a pixel.
        lean: sideways offset of the top of the head, in figure units.
        mirrored: whether x is turned round (a figure facing left).
    """

    canvas: Canvas
    height: int
    centre: int
    top: int
    lean: int = 0
    mirrored: bool = False

    def polygon(self, points: Sequence[Point], ink: int, over: Collection[int] = ()) -> None:
        """Fill a polygon that has one span per row."""
        self.canvas.polygon([self._place(x, y) for x, y in points], ink, over)

    def oval(self, x: int, y: int, rx: int, ry: int, ink: int, over: Collection[int] = ()) -> None:
        """Fill an ellipse."""
        self.canvas.ellipse(self._place(x, y), self._length(rx), self._length(ry), ink, over)

    def box(self, left: int, top: int, right: int, bottom: int, ink: int, over: Collection[int] = ()) -> None:
        """Fill a rectangle that follows the lean."""
        self.polygon(((left, top), (right, top), (right, bottom), (left, bottom)), ink, over)

    def dome(self, x: int, base: int, rx: int, rise: int, ink: int, over: Collection[int] = ()) -> None:
        """Fill the upper half of an ellipse (the lower half for a negative rise)."""
        left = [(x + rx * dx // 100, base - rise * dy // 100) for dx, dy in _DOME]
        right = [(x - rx * dx // 100, base - rise * dy // 100) for dx, dy in reversed(_DOME[:-1])]
        self.polygon(left + right, ink, over)

    def limb(self, joints: Sequence[tuple[int, int, int]], ink: int, over: Collection[int] = ()) -> None:
        """Fill a chain of tapered pieces with round joints, given as (x, y, half-width)."""
        for x, y, half in joints:
            self.oval(x, y, half, half, ink, over)
        for (x1, y1, half1), (x2, y2, half2) in zip(joints, joints[1:]):
            dx, dy = x2 - x1, y2 - y1
            length = max(1, isqrt(dx * dx + dy * dy))
            # The four corners stand off the centre line at right angles, so that bent limbs keep their width.
            ax, ay, bx, by = dy * half1 // length, dx * half1 // length, dy * half2 // length, dx * half2 // length
            corners = ((x1 - ax, y1 + ay), (x1 + ax, y1 - ay), (x2 + bx, y2 - by), (x2 - bx, y2 + by))
            self.polygon(corners, ink, over)

    def line(self, points: Sequence[Point], half: int, ink: int, over: Collection[int] = ()) -> None:
        """Draw a line of constant half-width, at least about one drawn pixel wide."""
        thick = max(half, (FIGURE_UNITS * SUBPIXELS // 2) // self.height + 1)
        self.limb([(x, y, thick) for x, y in points], ink, over)

    def _place(self, x: int, y: int) -> Point:
        if self.mirrored:
            x = -x
        x += self.lean * (FIGURE_UNITS - y) // FIGURE_UNITS
        return self.centre + self._length(x), self.top + self._length(y)

    def _length(self, units: int) -> int:
        return units * self.height // FIGURE_UNITS
