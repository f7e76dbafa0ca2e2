"""Upper garments seen from the front and from the back."""

from tbps_world.synth.attributes import Person
from tbps_world.synth.body import Paints, Proportions
from tbps_world.synth.sketch import Sketch

HEMS = {"t-shirt": 520, "shirt": 530, "jacket": 528, "coat": 640, "hoodie": 524, "striped top": 516}
"""Height of the lower hem of each upper garment, in figure units."""


def draw_torso(sketch: Sketch, person: Person, paints: Paints, size: Proportions, back: bool) -> None:
    """Draw the garment without its sleeves."""
    upper = paints.upper
    hem = HEMS[person.upper_type]
    low = size.hip + (26 if person.upper_type == "coat" else 6)
    left = (
        (-34, 176),
        (-size.shoulder * 72 // 100, 188),
        (-size.shoulder, 216),
        (-size.chest, 300),
        (-size.waist, 400),
        (-size.hip - 2, 490),
        (-low, hem),
    )
    outline = [*left, *((-x, y) for x, y in reversed(left))]
    sketch.polygon(outline, upper.base)
    sketch.polygon(
        ((size.chest * 52 // 100, 176), (size.shoulder, 176), (low, hem), (size.hip * 56 // 100, hem)),
        upper.shade,
        over=(upper.base,),
    )
    if person.build == "heavy" and not back:
        sketch.line(
            ((-size.waist * 60 // 100, 452), (0, 468), (size.waist * 60 // 100, 452)), 4, upper.seam, over=upper.tones
        )
    decorate = _BACK_DETAILS if back else _FRONT_DETAILS
    decorate[person.upper_type](sketch, paints, size, hem)


def _front_t_shirt(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    sketch.dome(0, 176, 44, -34, paints.face.base)
    sketch.line(((-46, 178), (-24, 208), (0, 214), (24, 208), (46, 178)), 5, paints.upper.seam, over=paints.upper.tones)


def _front_shirt(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-26, 176), (26, 176), (0, 232)), paints.face.base)
    sketch.line(((0, 232), (0, hem)), 5, upper.seam, over=upper.tones)
    for y in range(256, hem - 10, 56):
        sketch.oval(9, y, 8, 8, paints.stripe)
    for side in (-1, 1):
        sketch.polygon(((side * 16, 168), (side * 54, 180), (side * 40, 240), (0, 226)), upper.shade)
        sketch.line(((side * 54, 182), (side * 40, 240), (side * 2, 228)), 4, upper.seam)
    pocket = size.chest * 50 // 100
    sketch.box(pocket - 26, 290, pocket + 26, 300, upper.seam, over=upper.tones)


def _front_jacket(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-30, 174), (30, 174), (44, hem), (-44, hem)), paints.lining)
    sketch.polygon(((-26, 174), (26, 174), (0, 210)), paints.face.base)
    for side in (-1, 1):
        sketch.line(((side * 32, 180), (side * 46, hem)), 7, upper.seam)
        sketch.polygon(((side * 26, 170), (side * 66, 182), (side * 74, 250), (side * 36, 230)), upper.seam)
        sketch.line(
            ((side * size.chest * 80 // 100, 420), (side * size.chest * 56 // 100, 470)),
            6,
            upper.seam,
            over=upper.tones,
        )
    _draw_hem_band(sketch, paints, size, hem)


def _front_coat(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-30, 174), (30, 174), (0, 290)), paints.lining)
    sketch.polygon(((-22, 174), (22, 174), (0, 206)), paints.face.base)
    for side in (-1, 1):
        sketch.polygon(((side * 24, 170), (side * 62, 182), (side * 78, 250), (side * 48, 262), (0, 320)), upper.seam)
        for y in (350, 480, 550):
            sketch.oval(side * 30, y, 10, 10, upper.seam)
    sketch.line(((0, 310), (0, hem)), 5, upper.seam)
    _draw_belt(sketch, paints, size)


def _front_hoodie(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-62, 164), (62, 164), (40, 214), (0, 232), (-40, 214)), upper.seam)
    sketch.dome(0, 172, 36, -34, paints.face.shade)
    for side in (-1, 1):
        sketch.line(((side * 20, 216), (side * 24, 296)), 5, paints.stripe)
    pocket = size.waist * 66 // 100
    sketch.polygon(
        (
            (-pocket * 60 // 100, 400),
            (pocket * 60 // 100, 400),
            (pocket, 440),
            (pocket, 492),
            (-pocket, 492),
            (-pocket, 440),
        ),
        upper.seam,
    )
    sketch.polygon(
        (
            (-pocket * 58 // 100, 408),
            (pocket * 58 // 100, 408),
            (pocket - 8, 442),
            (pocket - 8, 484),
            (-pocket + 8, 484),
            (-pocket + 8, 442),
        ),
        upper.base,
    )
    _draw_hem_band(sketch, paints, size, hem)


def _front_striped(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    draw_stripes(sketch, paints, hem)
    sketch.dome(0, 176, 52, -22, paints.face.base)


def _back_plain(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    sketch.line(((-44, 182), (0, 192), (44, 182)), 5, paints.upper.seam, over=paints.upper.tones)


def _back_shirt(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-44, 168), (44, 168), (52, 200), (-52, 200)), upper.shade)
    sketch.line(((-52, 202), (52, 202)), 4, upper.seam)
    sketch.line(((-size.shoulder, 256), (size.shoulder, 256)), 5, upper.seam, over=upper.tones)
    sketch.line(((0, 256), (0, hem)), 4, upper.seam, over=upper.tones)


def _back_jacket(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-48, 168), (48, 168), (56, 206), (-56, 206)), upper.seam)
    for side in (-1, 1):
        sketch.line(
            ((side * size.chest * 58 // 100, 210), (side * size.waist * 50 // 100, hem)),
            5,
            upper.seam,
            over=upper.tones,
        )
    _draw_hem_band(sketch, paints, size, hem)


def _back_coat(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.polygon(((-50, 168), (50, 168), (60, 210), (-60, 210)), upper.seam)
    sketch.line(((0, 430), (0, hem)), 7, upper.seam)
    _draw_belt(sketch, paints, size)


def _back_hoodie(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    upper = paints.upper
    sketch.oval(0, 212, 84, 62, upper.seam)
    sketch.oval(0, 204, 70, 48, upper.shade)
    _draw_hem_band(sketch, paints, size, hem)


def _back_striped(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    draw_stripes(sketch, paints, hem)


_FRONT_DETAILS = {
    "t-shirt": _front_t_shirt,
    "shirt": _front_shirt,
    "jacket": _front_jacket,
    "coat": _front_coat,
    "hoodie": _front_hoodie,
    "striped top": _front_striped,
}
_BACK_DETAILS = {
    "t-shirt": _back_plain,
    "shirt": _back_shirt,
    "jacket": _back_jacket,
    "coat": _back_coat,
    "hoodie": _back_hoodie,
    "striped top": _back_striped,
}


def _draw_hem_band(sketch: Sketch, paints: Paints, size: Proportions, hem: int) -> None:
    wide = size.hip + 60
    sketch.box(-wide, hem - 26, wide, hem, paints.upper.seam, over=paints.upper.tones)


def _draw_belt(sketch: Sketch, paints: Paints, size: Proportions) -> None:
    wide = size.waist + 60
    sketch.box(-wide, 402, wide, 432, paints.upper.seam, over=paints.upper.tones)
    sketch.box(-22, 396, 22, 438, paints.lining, over=(*paints.upper.tones, paints.upper.seam))


def draw_stripes(sketch: Sketch, paints: Paints, hem: int) -> None:
    """Lay stripes over plain cloth; they continue over the sleeves."""
    for y in range(212, hem, 62):
        sketch.box(-260, y, 260, y + 20, paints.stripe, over=paints.upper.tones)
