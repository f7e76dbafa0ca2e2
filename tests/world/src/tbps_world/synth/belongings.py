"""Bags, umbrellas and phones."""

from tbps_world.synth.body import Paint, Paints, Proportions
from tbps_world.synth.raster import Point
from tbps_world.synth.sketch import Sketch


def draw_backpack_straps(sketch: Sketch, size: Proportions, paint: Paint) -> None:
    """Front view: two shoulder straps over the chest."""
    x = size.shoulder * 58 // 100
    for side in (-1, 1):
        sketch.polygon(
            ((side * (x - 20), 184), (side * (x + 20), 196), (side * (x + 18), 400), (side * (x - 18), 400)),
            paint.base,
        )
        sketch.line(((side * (x + 14), 200), (side * (x + 13), 396)), 3, paint.seam)


def draw_backpack(sketch: Sketch, size: Proportions, paint: Paint) -> None:
    """Back view: the whole pack."""
    half = size.chest * 84 // 100
    sketch.line(((-16, 190), (-16, 172), (16, 172), (16, 190)), 5, paint.seam)
    sketch.dome(0, 260, half, 76, paint.base)
    sketch.box(-half, 256, half, 440, paint.base)
    sketch.dome(0, 438, half, -26, paint.base)
    sketch.box(half * 60 // 100, 262, half, 436, paint.shade, over=(paint.base,))
    pocket = half * 70 // 100
    sketch.box(-pocket, 340, pocket, 436, paint.seam)
    sketch.box(-pocket + 9, 350, pocket - 9, 428, paint.base)
    sketch.line(((-half + 12, 272), (half - 12, 272)), 4, paint.seam)


def draw_backpack_side(sketch: Sketch, size: Proportions, paint: Paint) -> None:
    """Side view, the person looks to the right: the pack bulges behind the back."""
    back = -size.depth + 8
    outline = ((back, 206), (back - 64, 204), (back - 110, 250), (back - 126, 400), (back - 96, 454), (back, 450))
    sketch.polygon(outline, paint.base)
    sketch.polygon(((back - 112, 330), (back - 60, 330), (back - 60, 440), (back - 112, 436)), paint.seam)
    sketch.polygon(((back - 108, 342), (back - 66, 342), (back - 66, 430), (back - 108, 426)), paint.shade)


def draw_backpack_side_strap(sketch: Sketch, size: Proportions, paint: Paint) -> None:
    """Side view: the strap over the near shoulder."""
    sketch.limb(
        ((-size.depth + 20, 204, 14), (10, 190, 14), (34, 230, 14), (24, 320, 13), (-size.depth + 14, 400, 12)),
        paint.base,
    )


def draw_handbag(sketch: Sketch, hand: Point, paint: Paint) -> None:
    """A handbag that hangs from a hand."""
    x, y = hand
    sketch.line(((x - 40, y + 66), (x - 24, y + 6), (x + 24, y + 6), (x + 40, y + 66)), 8, paint.seam)
    sketch.polygon(((x - 62, y + 62), (x + 62, y + 62), (x + 76, y + 172), (x - 76, y + 172)), paint.base)
    sketch.polygon(((x + 26, y + 62), (x + 62, y + 62), (x + 76, y + 172), (x + 34, y + 172)), paint.shade)
    sketch.polygon(((x - 62, y + 62), (x + 62, y + 62), (x + 66, y + 92), (x - 66, y + 92)), paint.seam)


def draw_shoulder_bag(sketch: Sketch, strap: tuple[Point, Point], paint: Paint) -> None:
    """A bag at the hip whose strap runs over the body.

    Args:
        sketch: where to draw.
        strap: the strap's end on the shoulder and its end at the hip, above the middle of the bag.
        paint: inks of the bag.
    """
    sketch.line(strap, 13, paint.base)
    x, y = strap[1]
    sketch.polygon(((x - 68, y), (x + 68, y), (x + 64, y + 126), (x - 64, y + 126)), paint.base)
    sketch.polygon(((x - 68, y), (x + 68, y), (x + 50, y + 66), (x - 50, y + 66)), paint.seam)
    sketch.polygon(((x - 60, y), (x + 60, y), (x + 42, y + 56), (x - 42, y + 56)), paint.shade)


def draw_umbrella(sketch: Sketch, hand: Point, paint: Paint) -> None:
    """A folded umbrella held at its hook, its tip near the ground."""
    x, y = hand
    sketch.line(((x - 22, y - 8), (x - 22, y - 30), (x, y - 36), (x, y + 30)), 7, paint.seam)
    sketch.polygon(((x - 16, y + 26), (x + 16, y + 26), (x + 32, y + 120), (x - 32, y + 120)), paint.base)
    sketch.polygon(((x - 32, y + 120), (x + 32, y + 120), (x + 6, y + 400), (x - 6, y + 400)), paint.base)
    sketch.polygon(((x + 4, y + 40), (x + 18, y + 40), (x + 32, y + 120), (x + 4, y + 390)), paint.shade)


def draw_phone(sketch: Sketch, hand: Point, paints: Paints, *, screen: bool) -> None:
    """A phone in a raised hand; the screen shows only where it is turned to the camera."""
    x, y = hand
    sketch.polygon(((x - 26, y - 56), (x + 26, y - 56), (x + 26, y + 34), (x - 26, y + 34)), paints.phone)
    if screen:
        sketch.polygon(((x - 14, y - 42), (x + 14, y - 42), (x + 14, y + 16), (x - 14, y + 16)), paints.screen)
