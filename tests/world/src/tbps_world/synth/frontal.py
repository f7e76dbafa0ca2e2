"""The figure from the front and from the back."""

from tbps_world.synth import belongings, head
from tbps_world.synth.attributes import Person
from tbps_world.synth.body import Paint, Paints, Proportions, proportions
from tbps_world.synth.raster import Point
from tbps_world.synth.sketch import Sketch
from tbps_world.synth.torso import HEMS, draw_stripes, draw_torso

_HIP = 500
_ANKLE = 930


def draw_frontal(sketch: Sketch, person: Person, paints: Paints, stride: int, *, back: bool) -> None:
    """Draw a whole figure, from the far parts to the near ones.

    Args:
        sketch: where to draw.
        person: who.
        paints: the person's inks.
        stride: walking phase, -3 to 3.
        back: seen from behind.
    """
    size = proportions(person)
    if not back:
        head.draw_hair_behind(sketch, person, paints)
        if person.upper_type == "hoodie":
            sketch.oval(0, 168, 92, 48, paints.upper.shade)
    _draw_legs(sketch, person, paints, size, stride, back)
    draw_torso(sketch, person, paints, size, back)
    # The person's right hand is on the left of the picture from the front, on its right from behind.
    right = 1 if back else -1
    right_hand = _draw_arm(sketch, person, paints, size, right, stride)
    raised = person.accessory == "phone"
    if raised and not back:
        left_hand = _draw_raised_arm(sketch, person, paints, size, -right)
    elif raised:
        left_hand = _draw_folded_arm(sketch, person, paints, size, -right)
    else:
        left_hand = _draw_arm(sketch, person, paints, size, -right, -stride)
    if person.bag_type == "backpack":
        if back:
            belongings.draw_backpack(sketch, size, paints.bag)
        else:
            belongings.draw_backpack_straps(sketch, size, paints.bag)
    elif person.bag_type == "shoulder bag":
        strap = ((-right * size.shoulder * 50 // 100, 186), (right * (size.hip + 18), 474))
        belongings.draw_shoulder_bag(sketch, strap, paints.bag)
    elif person.bag_type == "handbag":
        belongings.draw_handbag(sketch, right_hand, paints.bag)
    if person.accessory == "umbrella":
        belongings.draw_umbrella(sketch, left_hand, paints.umbrella)
    elif raised and not back:
        belongings.draw_phone(sketch, left_hand, paints, screen=False)
        sketch.oval(left_hand[0] - right * 4, left_hand[1] + 22, 30, 16, paints.limbs.base)
    if back:
        head.draw_back(sketch, person, paints)
    else:
        head.draw_front(sketch, person, paints)


def _draw_legs(sketch: Sketch, person: Person, paints: Paints, size: Proportions, stride: int, back: bool) -> None:
    lower, limbs = paints.lower, paints.limbs
    for side in (-1, 1):
        lift = max(0, side * stride) * 9
        ankle = _ANKLE - lift
        foot = side * max(44, size.hip * 46 // 100)
        outer = side * size.hip
        if person.lower_type in ("trousers", "jeans"):
            flare = 36 if person.lower_type == "trousers" else 30
            flare += max(0, size.leg - 50) // 3
            points = (
                (outer, _HIP - 20),
                (side * 2, _HIP - 20),
                (side * 3, _HIP + 50),
                (foot - side * flare, ankle),
                (foot + side * flare, ankle),
            )
            sketch.polygon(points, lower.base)
            crease = (
                (side * 2, _HIP + 40),
                (side * size.hip // 3, _HIP + 40),
                (foot - side * flare // 4, ankle),
                (foot - side * flare, ankle),
            )
            sketch.polygon(crease, lower.shade, over=(lower.base,))
            if person.lower_type == "jeans":
                _draw_denim(sketch, lower, side, size, foot, flare, ankle, back)
            continue
        calf = size.leg * 62 // 100
        legs = ((side * size.hip * 50 // 100, 560, size.leg), (foot, 730, calf + 4), (foot, ankle + 10, calf - 8))
        sketch.limb(legs, limbs.base)
        sketch.line(
            ((foot - side * (calf - 8), 700), (foot - side * (calf - 16), ankle)), 7, limbs.shade, over=(limbs.base,)
        )
        if person.lower_type == "shorts":
            width = size.leg + 12
            centre = side * size.hip * 52 // 100
            sketch.polygon(
                (
                    (outer, _HIP - 20),
                    (0, _HIP - 20),
                    (side * 3, 560),
                    (centre - side * width + side * 4, 704),
                    (centre + side * width + side * 6, 704),
                    (outer + side * 6, 560),
                ),
                lower.base,
            )
            sketch.polygon(
                (
                    (0, _HIP),
                    (side * 30, _HIP),
                    (centre - side * 20, 704),
                    (centre - side * width + side * 4, 704),
                    (side * 3, 560),
                ),
                lower.shade,
                over=(lower.base,),
            )
            sketch.line(((centre - side * width, 690), (centre + side * width, 690)), 4, lower.seam, over=lower.tones)
    for side in (-1, 1):
        lift = max(0, side * stride) * 9
        _draw_shoe(sketch, person, paints, side * max(44, size.hip * 46 // 100), side, lift, back)
    if person.lower_type in ("skirt", "long skirt"):
        _draw_skirt(sketch, person, lower, size)


def _draw_denim(
    sketch: Sketch, lower: Paint, side: int, size: Proportions, foot: int, flare: int, ankle: int, back: bool
) -> None:
    """What tells jeans from trousers: turned-up pale cuffs, worn knees, and pockets."""
    cuff = (
        (foot - side * (flare + 6), ankle - 52),
        (foot + side * (flare + 6), ankle - 52),
        (foot + side * (flare + 6), ankle),
        (foot - side * (flare + 6), ankle),
    )
    sketch.polygon(cuff, lower.seam)
    sketch.oval((foot + side * size.hip // 2) // 2 + side * 14, 720, 17, 58, lower.seam, over=lower.tones)
    x = side * size.hip // 2
    if back:
        sketch.polygon(((x - 26, 556), (x + 26, 556), (x + 22, 612), (x, 624), (x - 22, 612)), lower.seam)
        sketch.polygon(((x - 17, 564), (x + 17, 564), (x + 14, 606), (x, 614), (x - 14, 606)), lower.base)
    else:
        sketch.line(
            ((x - side * 8, 534), (x + side * 4, 566), (side * (size.hip - 2), 578)), 5, lower.seam, over=lower.tones
        )


def _draw_skirt(sketch: Sketch, person: Person, lower: Paint, size: Proportions) -> None:
    hem, flare = (728, 44) if person.lower_type == "skirt" else (904, 66)
    wide = size.hip + flare
    sketch.polygon(
        (
            (-size.hip + 6, 470),
            (size.hip - 6, 470),
            (size.hip + 8, 540),
            (wide, hem),
            (-wide, hem),
            (-size.hip - 8, 540),
        ),
        lower.base,
    )
    sketch.dome(0, hem - 1, wide, -14, lower.base)
    for fold in (-60, -15, 30, 75):
        x = wide * fold // 100
        sketch.polygon(
            ((x * 60 // 100, 520), (x * 60 // 100 + 8, 520), (x + 30, hem + 14), (x, hem + 14)),
            lower.shade,
            over=(lower.base,),
        )
    sketch.line(((-wide, hem - 14), (wide, hem - 14)), 5, lower.seam, over=lower.tones)


def _draw_shoe(sketch: Sketch, person: Person, paints: Paints, x: int, side: int, lift: int, back: bool) -> None:
    shoes, limbs = paints.shoes, paints.limbs
    x += side * 6
    y = 962 - lift
    if person.shoes_type == "boots":
        sketch.polygon(((x - 42, 790 - lift), (x + 42, 790 - lift), (x + 38, y), (x - 38, y)), shoes.base)
        sketch.polygon(
            ((x - 42, 790 - lift), (x + 42, 790 - lift), (x + 41, 816 - lift), (x - 41, 816 - lift)), shoes.seam
        )
        sketch.oval(x, y, 46, 34, shoes.base)
        sketch.polygon(((x - 46, y + 18), (x + 46, y + 18), (x + 44, y + 36), (x - 44, y + 36)), shoes.seam)
    elif person.shoes_type == "sneakers":
        sketch.oval(x, y - 2, 48, 40, shoes.base)
        sketch.polygon(((x - 47, y + 14), (x + 47, y + 14), (x + 48, y + 36), (x - 48, y + 36)), paints.sole)
        sketch.oval(x, y - 20, 20, 14, shoes.seam)
        if not back:
            sketch.line(((x - 20, y), (x + 20, y)), 4, paints.sole)
    else:
        sketch.oval(x, y - 6, 38, 36, limbs.base)
        sketch.polygon(((x - 45, y + 16), (x + 45, y + 16), (x + 45, y + 36), (x - 45, y + 36)), shoes.base)
        sketch.polygon(((x - 42, y - 8), (x + 42, y - 8), (x + 44, y + 8), (x - 44, y + 8)), shoes.base)
        sketch.polygon(((x - 32, y - 44), (x + 32, y - 44), (x + 34, y - 26), (x - 34, y - 26)), shoes.base)


def _draw_arm(sketch: Sketch, person: Person, paints: Paints, size: Proportions, side: int, swing: int) -> Point:
    """Draw a hanging arm and return the place of its hand."""
    shoulder = side * (size.shoulder - size.arm + 8)
    elbow = side * (max(size.shoulder, size.waist) + 12)
    wrist = side * (max(size.shoulder, size.waist, size.hip) + 24)
    reach = 500 - 5 * abs(swing)
    _draw_sleeved(sketch, person, paints, ((shoulder, 226), (elbow, 366), (wrist, reach)), size.arm, side)
    hand = (wrist, reach + 16)
    sketch.oval(*hand, 24, 28, paints.limbs.base)
    return hand


def _draw_raised_arm(sketch: Sketch, person: Person, paints: Paints, size: Proportions, side: int) -> Point:
    """Front view: the forearm comes up before the chest, to hold a phone."""
    shoulder = side * (size.shoulder - size.arm + 8)
    elbow = side * (max(size.shoulder, size.waist) + 16)
    hand = (side * size.shoulder * 45 // 100, 290)
    _draw_sleeved(
        sketch, person, paints, ((shoulder, 226), (elbow, 380), (hand[0] + side * 26, hand[1] + 28)), size.arm, side
    )
    sketch.oval(*hand, 26, 26, paints.limbs.base)
    return hand


def _draw_folded_arm(sketch: Sketch, person: Person, paints: Paints, size: Proportions, side: int) -> Point:
    """Back view: the forearm disappears before the body."""
    shoulder = side * (size.shoulder - size.arm + 8)
    elbow = (side * (max(size.shoulder, size.waist) + 16), 380)
    _draw_sleeved(sketch, person, paints, ((shoulder, 226), elbow), size.arm, side)
    return elbow


def _draw_sleeved(
    sketch: Sketch, person: Person, paints: Paints, joints: tuple[Point, ...], half: int, side: int
) -> None:
    upper, limbs = paints.upper, paints.limbs
    widths = (half + 2, half - 1, half - 8)
    chain = [(x, y, width) for (x, y), width in zip(joints, widths)]
    rim = [(x, y, width + 6) for x, y, width in chain]
    if person.upper_type == "t-shirt":
        sketch.limb(chain, limbs.base)
        (x1, y1), (x2, y2) = joints[0], joints[1]
        sleeve = [(x1, y1, half + 6), (x1 + (x2 - x1) * 62 // 100, y1 + (y2 - y1) * 62 // 100, half + 8)]
        sketch.limb([(x, y, width + 5) for x, y, width in sleeve], upper.seam, over=upper.tones)
        sketch.limb(sleeve, upper.base if side < 0 else upper.shade)
        return
    # The rim separates the arm from the torso of the same colour.
    sketch.limb(rim, upper.seam, over=(*upper.tones, paints.stripe, paints.lining))
    bulge = 6 if person.upper_type in ("coat", "jacket", "hoodie") else 0
    sleeve = [(x, y, width + bulge) for x, y, width in chain]
    tone = upper.base if side < 0 else upper.shade
    sketch.limb(sleeve, tone)
    if person.upper_type == "striped top":
        draw_stripes(sketch, paints, HEMS[person.upper_type])
    elif person.upper_type in ("jacket", "hoodie", "coat"):
        x, y, width = sleeve[-1]
        if len(sleeve) == 3:
            sketch.oval(x, y - 6, width, 12, upper.seam)
