"""Proportions and paints of one person, shared by all views."""

from dataclasses import dataclass

from tbps_world.synth.attributes import Person
from tbps_world.synth.palette import (
    CLOTHES,
    EYE,
    HAIR,
    LENS,
    LIPS,
    PHONE,
    SCREEN,
    SKIN,
    UMBRELLA,
    blended,
    contrasted,
    shaded,
    toned,
)
from tbps_world.synth.raster import Canvas, Colour

PARTS = ("background", "hair", "head", "upper", "lower", "shoes", "bag", "headwear", "accessory", "skin")
"""Names of the numbers in a segmentation map; "head" is face and neck, "skin" is arms, hands, legs and feet."""

BACKGROUND, HAIR_PART, HEAD, UPPER, LOWER, SHOES, BAG, HEADWEAR, ACCESSORY, LIMBS = range(10)


@dataclass(frozen=True)
class Proportions:
    """Half-widths in figure units: seen from the front, and the depths seen from the side."""

    shoulder: int
    chest: int
    waist: int
    hip: int
    depth: int
    belly: int
    bust: int
    arm: int
    leg: int


_WIDTHS = {
    ("man", "slim"): Proportions(110, 98, 86, 88, 60, 54, 0, 27, 40),
    ("man", "average"): Proportions(134, 122, 112, 110, 76, 76, 0, 33, 50),
    ("man", "heavy"): Proportions(160, 154, 166, 152, 92, 124, 0, 40, 64),
    ("woman", "slim"): Proportions(94, 86, 68, 90, 54, 48, 10, 23, 40),
    ("woman", "average"): Proportions(112, 104, 88, 116, 66, 62, 16, 28, 51),
    ("woman", "heavy"): Proportions(140, 138, 142, 156, 86, 108, 20, 36, 66),
}


def proportions(person: Person) -> Proportions:
    """Return the half-widths of the person's gender and build."""
    return _WIDTHS[person.gender, person.build]


@dataclass(frozen=True)
class Paint:
    """Ink numbers of one coloured thing: its own tone, the tone away from the light, and the tone of its seams."""

    base: int
    shade: int
    seam: int

    @property
    def tones(self) -> tuple[int, int]:
        """The inks of plain cloth, over which seams and stripes are drawn."""
        return self.base, self.shade


@dataclass(frozen=True)
class Paints:
    """All inks of one person. Things the person does not have are mixed too: an unused ink costs nothing."""

    face: Paint
    limbs: Paint
    hair: Paint
    upper: Paint
    lower: Paint
    shoes: Paint
    bag: Paint
    headwear: Paint
    umbrella: Paint
    stripe: int
    lining: int
    sole: int
    eye: int
    eye_white: int
    lips: int
    beard: int
    frame: int
    lens: int
    phone: int
    screen: int


def mix_paints(canvas: Canvas, person: Person) -> Paints:
    """Mix the person's inks on the canvas."""

    def paint(colour: Colour, part: int) -> Paint:
        return Paint(canvas.mix(colour, part), canvas.mix(shaded(colour), part), canvas.mix(contrasted(colour), part))

    skin = SKIN[person.skin]
    hair = HAIR.get(person.hair_colour, HAIR["grey"] if person.age == "elderly" else HAIR["brown"])
    upper = CLOTHES[person.upper_colour]
    pale = person.upper_colour in ("white", "yellow", "pink")
    return Paints(
        face=paint(skin, HEAD),
        limbs=paint(skin, LIMBS),
        hair=paint(hair, HAIR_PART),
        upper=paint(upper, UPPER),
        lower=paint(CLOTHES[person.lower_colour], LOWER),
        shoes=paint(CLOTHES[person.shoes_colour], SHOES),
        bag=paint(CLOTHES.get(person.bag_colour, EYE), BAG),
        headwear=paint(CLOTHES.get(person.headwear_colour, EYE), HEADWEAR),
        umbrella=paint(UMBRELLA, ACCESSORY),
        stripe=canvas.mix(toned(upper, 38) if pale else (244, 244, 244), UPPER),
        lining=canvas.mix((70, 72, 80) if pale else (236, 236, 232), UPPER),
        sole=canvas.mix((88, 88, 92) if person.shoes_colour == "white" else (232, 232, 232), SHOES),
        eye=canvas.mix(EYE, HEAD),
        eye_white=canvas.mix((250, 250, 250), HEAD),
        lips=canvas.mix(LIPS if person.gender == "woman" else toned(skin, 66), HEAD),
        beard=canvas.mix(blended(hair, skin, 12), HEAD),
        frame=canvas.mix((12, 12, 16), ACCESSORY),
        lens=canvas.mix(LENS, ACCESSORY),
        phone=canvas.mix(PHONE, ACCESSORY),
        screen=canvas.mix(SCREEN, ACCESSORY),
    )
