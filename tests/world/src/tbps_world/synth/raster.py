"""An integer rasteriser: shapes with one span per row, painted into one map of ink numbers.

All coordinates are integers in sixteenths of a pixel, so the result is the same array on every platform. A shape writes
the number of its ink; colours and body parts are looked up once, at the end.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

SUBPIXELS = 16
_HALF = SUBPIXELS // 2

Point = tuple[int, int]
Colour = tuple[int, int, int]


@dataclass
class Canvas:
    """A picture in the making.

    Attributes:
        inks: `[height, width]` uint8, the ink of each pixel; ink 0 is the first one mixed.
        colours: RGB of each ink.
        parts: body part of each ink (0 = background).
    """

    height: int
    width: int
    inks: np.ndarray = field(init=False)
    colours: list[Colour] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inks = np.zeros((self.height, self.width), dtype=np.uint8)
        self._rows = np.arange(self.height, dtype=np.int64)[:, None] * SUBPIXELS + _HALF
        self._columns = np.arange(self.width, dtype=np.int64) * SUBPIXELS + _HALF

    def mix(self, colour: Colour, part: int) -> int:
        """Return the number of a new ink.

        Raises:
            ValueError: 256 inks are in use.
        """
        if len(self.colours) == 256:
            raise ValueError("a canvas holds at most 256 inks")
        self.colours.append(colour)
        self.parts.append(part)
        return len(self.colours) - 1

    def polygon(self, points: Sequence[Point], ink: int, over: Collection[int] = ()) -> None:
        """Fill a polygon that crosses every row in one span (every convex one does).

        Args:
            points: corners (x, y) in sixteenths of a pixel; a pixel is inside when its centre is.
            ink: ink to paint.
            over: if given, only pixels that hold one of these inks are painted.
        """
        heights = [y for _, y in points]
        top, bottom = max(0, _first_centre(min(heights))), min(self.height, _first_centre(max(heights)))
        if top >= bottom:
            return
        # A level side is never crossed and would be a division by zero.
        sides = [(x1, y1, x2 - x1, y2) for (x1, y1), (x2, y2) in zip(points, (*points[1:], points[0])) if y1 != y2]
        x, y, run, end = np.array(sides, dtype=np.int64).T
        centres = self._rows[top:bottom]
        crossed = (y <= centres) != (end <= centres)
        crossings = (centres - y) * run
        crossings //= end - y
        crossings += x
        outside = self.width * SUBPIXELS * 4
        left = np.where(crossed, crossings, outside).min(axis=1, keepdims=True)
        right = np.where(crossed, crossings, -outside).max(axis=1, keepdims=True)
        widths = [x for x, _ in points]
        self._fill((top, bottom, min(widths), max(widths)), left, right, ink, over)

    def ellipse(self, centre: Point, rx: int, ry: int, ink: int, over: Collection[int] = ()) -> None:
        """Fill an axis-parallel ellipse; all lengths in sixteenths of a pixel."""
        if rx <= 0 or ry <= 0:
            return
        x, y = centre
        top, bottom = max(0, _first_centre(y - ry)), min(self.height, _first_centre(y + ry))
        if top >= bottom:
            return
        offsets = self._rows[top:bottom] - y
        # The radicand is an integer far below 2^53, so the IEEE square root has an exact integer part.
        half = np.sqrt((ry * ry - offsets * offsets) * (rx * rx)).astype(np.int64) // ry
        self._fill((top, bottom, x - rx, x + rx), x - half, x + half, ink, over)

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the colours `[height, width, 3]` and the parts `[height, width]`, both uint8."""
        colours = np.array(self.colours, dtype=np.uint8)
        parts = np.array(self.parts, dtype=np.uint8)
        return colours[self.inks], parts[self.inks]

    def _fill(
        self,
        extent: tuple[int, int, int, int],
        left: np.ndarray,
        right: np.ndarray,
        ink: int,
        over: Collection[int],
    ) -> None:
        """Paint, in each row, the pixels whose centre lies in [left, right).

        Args:
            extent: first row, row after the last one, least x and largest x of the shape.
            left: `[rows, 1]`.
            right: `[rows, 1]`.
            ink: ink to paint.
            over: if given, only pixels that hold one of these inks are painted.
        """
        top, bottom, least, largest = extent
        start, stop = max(0, _first_centre(least)), min(self.width, _first_centre(largest))
        if start >= stop:
            return
        centres = self._columns[start:stop]
        inside = centres >= left
        inside &= centres < right
        window = self.inks[top:bottom, start:stop]
        if over:
            held = np.zeros(256, dtype=bool)
            held[list(over)] = True
            inside &= held[window]
        window[inside] = ink


def _first_centre(place: int) -> int:
    """Number of the first pixel whose centre is at this place or after it."""
    return (place + (SUBPIXELS - 1 - _HALF)) // SUBPIXELS
