"""The figure from the side. Everything is drawn looking to the right; the sketch mirrors it for the left."""

from tbps_world.synth import belongings, head
from tbps_world.synth.attributes import Person
from tbps_world.synth.body import Paints, Proportions, proportions
from tbps_world.synth.raster import Point
from tbps_world.synth.sketch import Sketch
from tbps_world.synth.torso import HEMS, draw_stripes

_HIP = 500
_ANKLE = 930


def draw_profile(sketch: Sketch, person: Person, paints: Paints, stride: int, *, right_side: bool) -> None:
    """Draw a whole figure, from the far parts to the near ones.

    Args:
        sketch: where to draw; mirrored for a figure that looks to the left.
        person: who.
        paints: the person's inks.
        stride: walking phase, -3 to 3; the legs are never closed entirely, so that both are seen.
        right_side: the camera sees the person's right side (looking to the right of the picture).
    """
    size = proportions(person)
    step = stride * 26 + (30 if stride >= 0 else -30)
    raised = person.accessory == "phone"
    # Handbag and shoulder bag are on the person's right, umbrella and phone on the left.
    if right_side:
        far_hand = _draw_arm(sketch, person, paints, size, step // 2, raised=raised, near=False)
        if person.accessory == "umbrella":
            belongings.draw_umbrella(sketch, far_hand, paints.umbrella)
        elif raised:
            _draw_held_phone(sketch, paints, far_hand)
    else:
        far_hand = _draw_arm(sketch, person, paints, size, step // 2, raised=False, near=False)
        if person.bag_type == "handbag":
            belongings.draw_handbag(sketch, far_hand, paints.bag)
        elif person.bag_type == "shoulder bag":
            belongings.draw_shoulder_bag(sketch, ((0, 300), (-size.depth + 4, 470)), paints.bag)
    if person.bag_type == "backpack":
        belongings.draw_backpack_side(sketch, size, paints.bag)
    _draw_legs(sketch, person, paints, size, step)
    _draw_torso(sketch, person, paints, size)
    if person.bag_type == "backpack":
        belongings.draw_backpack_side_strap(sketch, size, paints.bag)
    elif person.bag_type == "shoulder bag":
        sketch.line(
            ((size.depth * 40 // 100, 192), (0, 330), (-size.depth + 10, 470)),
            12,
            paints.bag.base,
            over=(*paints.upper.tones, paints.upper.seam, paints.stripe),
        )
    near_hand = _draw_arm(sketch, person, paints, size, -step // 2, raised=raised and not right_side, near=True)
    if right_side:
        if person.bag_type == "handbag":
            belongings.draw_handbag(sketch, near_hand, paints.bag)
        elif person.bag_type == "shoulder bag":
            belongings.draw_shoulder_bag(sketch, ((-10, 470), (-18, 472)), paints.bag)
    elif person.accessory == "umbrella":
        belongings.draw_umbrella(sketch, near_hand, paints.umbrella)
    elif raised:
        _draw_held_phone(sketch, paints, near_hand)
    head.draw_side(sketch, person, paints)


def _draw_held_phone(sketch: Sketch, paints: Paints, hand: Point) -> None:
    belongings.draw_phone(sketch, (hand[0] + 14, hand[1]), paints, screen=True)
    sketch.oval(hand[0], hand[1] + 20, 24, 16, paints.limbs.base)


def _draw_legs(sketch: Sketch, person: Person, paints: Paints, size: Proportions, step: int) -> None:
    lower, limbs = paints.lower, paints.limbs
    thigh = max(size.leg + 4, size.depth * 72 // 100)
    for foot, near in ((-step, False), (step, True)):
        lift = 18 if foot < 0 else 0
        ankle = _ANKLE - lift
        cloth = lower.base if near else lower.shade
        knee = (foot * 45 // 100 + 10, 715)
        if person.lower_type in ("trousers", "jeans"):
            wide = size.leg * 90 // 100
            slack = 8 if person.lower_type == "trousers" else 2
            joints = ((0, 545, thigh), (*knee, wide), (foot, ankle - 8, wide * 72 // 100 + slack))
            if near:
                sketch.limb([(x, y, half + 6) for x, y, half in joints], lower.seam, over=(lower.shade,))
            sketch.limb(joints, cloth)
            if person.lower_type == "jeans":
                cuff = wide * 72 // 100 + 8
                sketch.polygon(
                    (
                        (foot - cuff, ankle - 44),
                        (foot + cuff, ankle - 44),
                        (foot + cuff, ankle + 4),
                        (foot - cuff, ankle + 4),
                    ),
                    lower.seam,
                )
                sketch.oval(knee[0] + wide * 40 // 100, knee[1], 14, 50, lower.seam, over=(cloth,))
        else:
            calf = size.leg * 62 // 100
            skin = limbs.base if near else limbs.shade
            sketch.limb(((0, 560, thigh - 6), (*knee, calf + 2), (foot, ankle + 8, calf - 9)), skin)
            if person.lower_type == "shorts":
                sketch.limb(((0, 540, thigh + 4), (foot * 38 // 100 + 8, 676, size.leg + 6)), cloth)
        _draw_shoe(sketch, person, paints, foot, lift, near=near)
    if person.lower_type == "jeans":
        sketch.polygon(
            ((-thigh + 4, 548), (-thigh + 50, 548), (-thigh + 46, 606), (-thigh + 10, 606)),
            lower.seam,
            over=lower.tones,
        )
    if person.lower_type in ("skirt", "long skirt"):
        _draw_skirt(sketch, person, paints, size, step)


def _draw_skirt(sketch: Sketch, person: Person, paints: Paints, size: Proportions, step: int) -> None:
    lower = paints.lower
    hem = 728 if person.lower_type == "skirt" else 904
    wide = max(size.depth, size.belly) + (30 if person.lower_type == "skirt" else 40) + abs(step) // 3
    waist = size.depth + 4
    sketch.polygon(
        ((-waist + 6, 470), (waist - 8, 470), (waist + 4, 545), (wide, hem), (-wide, hem), (-waist - 6, 545)),
        lower.base,
    )
    sketch.dome(0, hem - 1, wide, -12, lower.base)
    for fold in (-70, -20, 40):
        x = wide * fold // 100
        sketch.polygon(
            ((x * 60 // 100, 530), (x * 60 // 100 + 8, 530), (x + 26, hem + 12), (x, hem + 12)),
            lower.shade,
            over=(lower.base,),
        )
    sketch.line(((-wide, hem - 14), (wide, hem - 14)), 5, lower.seam, over=lower.tones)


def _draw_shoe(sketch: Sketch, person: Person, paints: Paints, x: int, lift: int, *, near: bool) -> None:
    shoes, limbs = paints.shoes, paints.limbs
    body = shoes.base if near else shoes.shade
    sole = 996 - lift
    shape = (
        (x - 38, sole - 70),
        (x + 34, sole - 70),
        (x + 46, sole - 48),
        (x + 92, sole - 34),
        (x + 100, sole),
        (x - 42, sole),
    )
    if person.shoes_type == "boots":
        sketch.polygon(((x - 40, sole - 206), (x + 40, sole - 206), (x + 38, sole - 60), (x - 38, sole - 60)), body)
        sketch.polygon(
            ((x - 40, sole - 206), (x + 40, sole - 206), (x + 40, sole - 180), (x - 40, sole - 180)), shoes.seam
        )
        sketch.polygon(shape, body)
        sketch.polygon(((x - 42, sole - 18), (x + 98, sole - 18), (x + 100, sole), (x - 42, sole)), shoes.seam)
    elif person.shoes_type == "sneakers":
        sketch.polygon(shape, body)
        sketch.polygon(((x - 44, sole - 22), (x + 100, sole - 22), (x + 104, sole), (x - 44, sole)), paints.sole)
        sketch.line(((x + 34, sole - 56), (x + 52, sole - 36)), 6, paints.sole)
    else:
        sketch.polygon(shape, limbs.base if near else limbs.shade)
        sketch.polygon(((x - 44, sole - 20), (x + 100, sole - 20), (x + 104, sole), (x - 44, sole)), body)
        sketch.polygon(((x - 38, sole - 66), (x + 36, sole - 66), (x + 36, sole - 46), (x - 38, sole - 46)), body)
        sketch.polygon(((x + 44, sole - 48), (x + 72, sole - 40), (x + 84, sole - 16), (x + 50, sole - 16)), body)


def _draw_torso(sketch: Sketch, person: Person, paints: Paints, size: Proportions) -> None:
    upper = paints.upper
    hem = HEMS[person.upper_type]
    depth, belly = size.depth, size.belly
    loose = 22 if person.upper_type == "coat" else 4
    outline = (
        (-30, 178), (26, 178), (depth * 72 // 100, 206), (depth + size.bust, 290), (belly, 400),
        (max(belly - 4, depth), 480), (depth + loose, hem),
        (-depth - loose, hem), (-depth - 4, 480), (-depth * 84 // 100, 400), (-depth, 270), (-depth * 70 // 100, 200),
    )  # fmt: skip
    sketch.polygon(outline, upper.base)
    sketch.polygon(
        ((-depth - 40, 190), (-depth * 45 // 100, 190), (-depth * 45 // 100, hem), (-depth - 40, hem)),
        upper.shade,
        over=(upper.base,),
    )
    if person.upper_type == "striped top":
        draw_stripes(sketch, paints, hem)
    elif person.upper_type == "hoodie":
        sketch.oval(-depth * 62 // 100, 190, 50, 44, upper.seam)
        sketch.oval(-depth * 62 // 100, 184, 36, 30, upper.shade)
        sketch.line(((depth * 60 // 100, 214), (depth * 72 // 100, 290)), 5, paints.stripe)
    elif person.upper_type in ("shirt", "jacket", "coat"):
        sketch.polygon(
            ((-36, 166), (26, 166), (depth * 74 // 100, 228), (10, 206), (-36, 200)),
            upper.shade if person.upper_type == "shirt" else upper.seam,
        )
    if person.upper_type in ("jacket", "coat"):
        front = max(depth, belly)
        sketch.polygon(
            ((depth * 80 // 100, 230), (front + 40, 230), (front + 40, hem), (front - 10, hem), (belly - 12, 400)),
            paints.lining if person.upper_type == "jacket" else upper.seam,
            over=upper.tones,
        )
    if person.upper_type in ("jacket", "hoodie"):
        sketch.box(-260, hem - 26, 260, hem, upper.seam, over=upper.tones)
    elif person.upper_type == "coat":
        sketch.box(-260, 404, 260, 434, upper.seam, over=upper.tones)


def _draw_arm(
    sketch: Sketch, person: Person, paints: Paints, size: Proportions, swing: int, *, raised: bool, near: bool
) -> Point:
    """Draw one arm and return the place of its hand."""
    upper, limbs = paints.upper, paints.limbs
    half = size.arm
    elbow: Point = (swing // 3 - 12, 368) if not raised else (6, 372)
    hand: Point = (swing + 14, 502 - abs(swing) // 6) if not raised else (max(size.depth, size.belly) + 44, 296)
    chain = ((-4, 232, half + 4), (elbow[0], elbow[1], half), (hand[0], hand[1], half - 8))
    cloth = upper.base if near else upper.shade
    skin = limbs.base if near else limbs.shade
    if person.upper_type == "t-shirt":
        sketch.limb(chain, skin)
        sketch.limb(((-4, 232, half + 13), (elbow[0] * 60 // 100, 318, half + 13)), upper.seam, over=upper.tones)
        sketch.limb(((-4, 232, half + 7), (elbow[0] * 60 // 100, 316, half + 8)), cloth)
    else:
        bulge = 6 if person.upper_type in ("coat", "jacket", "hoodie") else 0
        if near:
            sketch.limb(
                [(x, y, width + 6 + bulge) for x, y, width in chain],
                upper.seam,
                over=(*upper.tones, paints.stripe, paints.lining),
            )
        sketch.limb([(x, y, width + bulge) for x, y, width in chain], cloth)
        if person.upper_type == "striped top":
            draw_stripes(sketch, paints, HEMS[person.upper_type])
    sketch.oval(hand[0], hand[1] + 14, 24, 27, skin)
    return hand
