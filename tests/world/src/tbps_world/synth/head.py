"""Heads: face, hair, glasses and headwear, seen from the front, the back and the side."""

from tbps_world.synth.attributes import Person
from tbps_world.synth.body import Paints
from tbps_world.synth.sketch import Sketch

LONG_HAIR_END = 292


def draw_hair_behind(sketch: Sketch, person: Person, paints: Paints) -> None:
    """Front view: the part of long hair that hangs behind the shoulders."""
    if person.hair_length == "long":
        sketch.dome(0, 90, 84, 84, paints.hair.base)
        sketch.polygon(
            ((-84, 88), (84, 88), (98, 250), (84, LONG_HAIR_END), (-84, LONG_HAIR_END), (-98, 250)), paints.hair.shade
        )


def draw_front(sketch: Sketch, person: Person, paints: Paints) -> None:
    """Neck, face, hair, glasses and headwear from the front."""
    face, hair = paints.face, paints.hair
    sketch.box(-28, 140, 28, 196, face.shade)
    if person.hair_length != "bald":
        sketch.oval(0, 74, 74, 70, hair.base)
    for side in (-1, 1):
        sketch.oval(side * 62, 100, 13, 20, face.shade)
    sketch.oval(0, 92, 62, 78, face.base)
    if person.hair_length != "bald":
        _draw_fringe(sketch, person, paints)
    _draw_face(sketch, person, paints)
    if person.hair_length == "long":
        for side in (-1, 1):
            strand = (
                (side * 50, 44),
                (side * 84, 70),
                (side * 96, 250),
                (side * 84, 286),
                (side * 56, 280),
                (side * 60, 120),
            )
            sketch.polygon(strand, hair.base)
    if person.accessory == "glasses":
        for side in (-1, 1):
            sketch.oval(side * 30, 90, 26, 21, paints.frame)
            sketch.oval(side * 30, 90, 15, 11, paints.lens)
            sketch.oval(side * 30, 91, 8, 8, paints.eye)
        sketch.box(-62, 82, 62, 92, paints.frame, over=(*face.tones, hair.base))
    if person.headwear_type == "cap":
        sketch.dome(0, 58, 76, 66, paints.headwear.base)
        sketch.dome(0, 58, 34, 64, paints.headwear.shade)
        sketch.oval(0, 60, 74, 15, paints.headwear.seam)
    elif person.headwear_type == "hat":
        _draw_hat(sketch, paints)


def draw_back(sketch: Sketch, person: Person, paints: Paints) -> None:
    """Neck, hair and headwear from the back."""
    face, hair = paints.face, paints.hair
    sketch.box(-28, 130, 28, 196, face.shade)
    for side in (-1, 1):
        sketch.oval(side * 62, 98, 13, 20, face.shade)
    sketch.oval(0, 88, 64, 78, face.base)
    if person.hair_length == "short":
        sketch.oval(0, 76, 72, 72, hair.base)
        sketch.polygon(((-66, 90), (66, 90), (50, 152), (-50, 152)), hair.base)
        sketch.line(((-30, 142), (30, 142)), 5, hair.shade)
    elif person.hair_length == "long":
        sketch.dome(0, 92, 82, 88, hair.base)
        sketch.polygon(
            ((-82, 88), (82, 88), (98, 240), (70, LONG_HAIR_END), (-70, LONG_HAIR_END), (-98, 240)), hair.base
        )
        for x in (-44, 0, 44):
            sketch.line(((x, 90), (x * 5 // 4, 272)), 4, hair.shade)
    if person.headwear_type == "cap":
        sketch.dome(0, 78, 76, 86, paints.headwear.base)
        sketch.dome(0, 78, 28, 26, paints.hair.base if person.hair_length != "bald" else face.base)
        sketch.line(((-28, 78), (28, 78)), 6, paints.headwear.seam)
    elif person.headwear_type == "hat":
        _draw_hat(sketch, paints)


def draw_side(sketch: Sketch, person: Person, paints: Paints) -> None:
    """Neck, profile, hair, glasses and headwear of a head that looks to the right."""
    face, hair = paints.face, paints.hair
    sketch.polygon(((-34, 130), (24, 130), (26, 198), (-40, 198)), face.shade)
    if person.hair_length == "long":
        sketch.polygon(
            ((-62, 60), (4, 60), (10, 130), (-6, 262), (-40, LONG_HAIR_END), (-86, 280), (-84, 130)), hair.base
        )
    sketch.oval(6, 88, 64, 76, face.base)
    sketch.polygon(((40, 120), (64, 128), (60, 158), (28, 166)), face.base)
    sketch.polygon(((62, 76), (90, 116), (62, 122)), face.base)
    _draw_profile_marks(sketch, person, paints)
    sketch.oval(-8, 100, 12, 19, face.shade)
    if person.hair_length == "short":
        sketch.dome(0, 70, 72, 66, hair.base)
        sketch.polygon(((-72, 64), (-4, 64), (-16, 100), (-34, 146), (-58, 136), (-74, 96)), hair.base)
        sketch.polygon(((20, 40), (68, 56), (66, 74), (20, 70)), hair.base)
        sketch.oval(-8, 104, 11, 16, face.shade)
    elif person.hair_length == "long":
        sketch.dome(-2, 70, 76, 70, hair.base)
        sketch.polygon(((-78, 66), (34, 66), (18, 140), (2, 262), (-40, 290), (-84, 280), (-82, 130)), hair.base)
        sketch.line(((-20, 90), (-40, 270)), 4, hair.shade)
    if person.accessory == "glasses":
        sketch.line(((-6, 86), (40, 86)), 5, paints.frame)
        sketch.oval(50, 90, 21, 21, paints.frame)
        sketch.oval(51, 91, 10, 11, paints.lens)
    if person.headwear_type == "cap":
        sketch.dome(-2, 66, 78, 76, paints.headwear.base)
        sketch.polygon(((52, 44), (136, 58), (134, 72), (52, 70)), paints.headwear.seam)
    elif person.headwear_type == "hat":
        _draw_hat(sketch, paints)


def _draw_hat(sketch: Sketch, paints: Paints) -> None:
    sketch.oval(0, 52, 118, 21, paints.headwear.shade)
    sketch.dome(0, 52, 70, 78, paints.headwear.base)
    sketch.box(-69, 32, 69, 50, paints.headwear.seam)


def _draw_fringe(sketch: Sketch, person: Person, paints: Paints) -> None:
    hair = paints.hair
    if person.hair_length == "short" and person.age == "elderly" and person.gender == "man":
        sketch.dome(0, 40, 54, 30, hair.base)
    else:
        sketch.dome(0, 62, 64, 54, hair.base)
        sketch.polygon(((-14, 66), (8, 44), (40, 64), (62, 66), (62, 58), (0, 30)), paints.face.base, over=(hair.base,))
    if person.hair_length == "short" and person.gender == "woman":
        for side in (-1, 1):
            sketch.polygon(((side * 50, 44), (side * 76, 72), (side * 72, 146), (side * 52, 140)), hair.base)


def _draw_face(sketch: Sketch, person: Person, paints: Paints) -> None:
    face = paints.face
    for side in (-1, 1):
        sketch.oval(side * 27, 91, 15, 10, paints.eye_white)
        sketch.oval(side * 26, 91, 9, 11, paints.eye)
        sketch.line(((side * 14, 73), (side * 42, 73)), 4, paints.beard if person.hair_length != "bald" else paints.eye)
    sketch.polygon(((0, 94), (9, 118), (-9, 118)), face.shade)
    if person.gender == "man" and person.age == "elderly":
        sketch.dome(0, 126, 58, -46, paints.beard)
    elif person.gender == "man" and person.age == "middle-aged":
        sketch.polygon(((-8, 122), (8, 122), (32, 134), (-32, 134)), paints.beard)
    elif person.age == "elderly":
        for side in (-1, 1):
            sketch.line(((side * 24, 112), (side * 38, 136)), 4, face.seam)
        sketch.line(((-26, 62), (26, 62)), 3, face.seam, over=face.tones)
    elif person.age == "middle-aged":
        for side in (-1, 1):
            sketch.line(((side * 26, 114), (side * 34, 128)), 3, face.shade)
    half = 22 if person.gender == "woman" else 19
    sketch.polygon(((-half, 139), (half, 139), (half // 2, 148), (-half // 2, 148)), paints.lips)


def _draw_profile_marks(sketch: Sketch, person: Person, paints: Paints) -> None:
    face = paints.face
    sketch.oval(47, 90, 9, 10, paints.eye)
    sketch.line(((34, 73), (58, 73)), 4, paints.eye if person.hair_length == "bald" else paints.beard)
    if person.gender == "man" and person.age == "elderly":
        sketch.polygon(((0, 118), (62, 126), (62, 166), (30, 178), (0, 150)), paints.beard)
    elif person.gender == "man" and person.age == "middle-aged":
        sketch.polygon(((38, 124), (68, 122), (68, 134), (38, 136)), paints.beard)
    elif person.age != "young":
        sketch.line(((30, 112), (38, 134)), 4, face.seam if person.age == "elderly" else face.shade)
    sketch.polygon(((42, 138), (68, 136), (64, 146), (44, 147)), paints.lips)
