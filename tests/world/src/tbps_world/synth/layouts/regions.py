"""SDA: captioned pictures with boxes and phrases; and MALS: captioned pictures with 27 attribute labels.

Both show the training people in other pictures than CUHK-PEDES does, as the originals were made for pre-training.
"""

from typing import Any

from tbps_world.synth.attributes import ABSENT, Person
from tbps_world.synth.captions import Caption, write_caption
from tbps_world.synth.drawing import Seen
from tbps_world.synth.layouts.base import Layout, Placed, SeenPictures, records_text
from tbps_world.synth.vocabulary import GROUPS, group_phrase
from tbps_world.synth.world import World, camera_of

PRETRAINING_POOL = "pretraining"

SDA_SHARDS = tuple(
    f"{start}_{stop}"
    for start, stop in [*((a, a + 5000) for a in range(0, 60000, 5000)), (60000, 64000), (64000, 70000)]
)
SDA_REGIONS = ("upper", "lower", "shoes", "bag", "headwear")
SDA_LEAST_PIXELS = 30
_NO_BOX_PERCENT = 3
_GRID = 1 << 15
"""Corners are rounded inwards to this fraction of the side: centre and size are then exact binary fractions."""

MALS_SHARDS = (
    "4x",
    "c_g_a",
    *(f"c_g_a_{number}" for number in range(44)),
    "i_g_a",
    *(f"i_g_a_{number}" for number in range(44)),
)


def _pictures(world: World) -> list[tuple[int, int]]:
    return [(number, view) for number in world.numbers("train") for view in range(world.settings.views)]


def _caption(world: World, seen: SeenPictures, layout: str, number: int, view: int) -> Caption:
    picture = world.picture(number, view, PRETRAINING_POOL)
    generator = world.stream(layout, number, view, "caption")
    facing = camera_of(picture, world.settings.seed).facing
    return write_caption(picture.person, seen[picture], facing, generator, world.crowd("train"))


def _sda_name(world: World, number: int, view: int) -> str:
    shard = SDA_SHARDS[number % len(SDA_SHARDS)]
    return f"c_{shard}/{number * world.settings.views + view}_0.{world.settings.image_format}"


def _place_sda(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view, PRETRAINING_POOL), f"images/SDA/{_sda_name(world, number, view)}")
        for number, view in _pictures(world)
    ]


def _sda_files(world: World, seen: SeenPictures) -> dict[str, str]:
    shards: dict[str, list[dict[str, Any]]] = {shard: [] for shard in SDA_SHARDS}
    for number, view in _pictures(world):
        shards[SDA_SHARDS[number % len(SDA_SHARDS)]].append(_sda_record(world, seen, number, view))
    return {f"data/sda/sda_{shard}.json": records_text(records) for shard, records in shards.items()}


def _sda_record(world: World, seen: SeenPictures, number: int, view: int) -> dict[str, Any]:
    picture = world.picture(number, view, PRETRAINING_POOL)
    shown = seen[picture]
    caption = _caption(world, seen, "sda", number, view)
    generator = world.stream("sda", number, view, "regions")
    boxes, phrases = [], []
    if int(generator.integers(100)) >= _NO_BOX_PERCENT:
        regions = [("person", _union(shown))]
        regions += [
            (group, shown.boxes[group])
            for group in SDA_REGIONS
            if shown.pixels.get(group, 0) >= SDA_LEAST_PIXELS and f"{group}_type" in shown.visible
        ]
        for group, box in regions:
            stated = ["gender"] if group == "person" else GROUPS[group]
            phrase = caption.phrases.get(group) if group != "person" else None
            phrases.append(phrase or group_phrase(group, picture.person, stated, generator))
            boxes.append(normalised(box, world.settings.width, world.settings.height))
    return {
        "image": _sda_name(world, number, view),
        "boxes": boxes,
        "logits": [int(generator.integers(3500, 9001)) / 10000 for _ in boxes],
        "phrases": phrases,
        "caption": caption.text,
        "image_id": number,
    }


def _union(seen: Seen) -> tuple[int, int, int, int]:
    boxes = list(seen.boxes.values())
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )


def normalised(box: tuple[int, int, int, int], width: int, height: int) -> list[float]:
    """Return centre x, centre y, width and height as shares of the picture; never outside it, not even by rounding."""
    left, right = -(-box[0] * _GRID // width), box[2] * _GRID // width
    top, bottom = -(-box[1] * _GRID // height), box[3] * _GRID // height
    return [
        (left + right) / (2 * _GRID),
        (top + bottom) / (2 * _GRID),
        (right - left) / _GRID,
        (bottom - top) / _GRID,
    ]


def _mals_shard(number: int) -> int:
    return number % len(MALS_SHARDS)


def _mals_name(world: World, number: int, view: int) -> str:
    return f"gene_crop/{MALS_SHARDS[_mals_shard(number)]}/{number}_{view}.{world.settings.image_format}"


def _place_mals(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view, PRETRAINING_POOL), f"MALS/{_mals_name(world, number, view)}")
        for number, view in _pictures(world)
    ]


def _mals_files(world: World, seen: SeenPictures) -> dict[str, str]:
    shards: list[list[dict[str, Any]]] = [[] for _ in MALS_SHARDS]
    for number, view in _pictures(world):
        picture = world.picture(number, view, PRETRAINING_POOL)
        shard = _mals_shard(number)
        shards[shard].append(
            {
                "image": _mals_name(world, number, view),
                "caption": _caption(world, seen, "mals", number, view).text,
                "image_id": f"{MALS_SHARDS[shard]}_{number}",
                "label": mals_label(picture.person, seen[picture]),
            }
        )
    return {f"MALS/gene_attrs/g_{name}_attrs.json": records_text(rows) for name, rows in zip(MALS_SHARDS, shards)}


_MALS_QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gender", ("woman",)),
    ("age", ("young",)),
    ("age", ("middle-aged",)),
    ("age", ("elderly",)),
    ("hair_length", ("long",)),
    ("hair_length", ("bald",)),
    ("headwear_type", ("cap", "hat")),
    ("bag_type", ("backpack",)),
    ("bag_type", ("handbag",)),
    ("bag_type", ("shoulder bag",)),
    ("upper_type", ("t-shirt",)),
    ("lower_type", ("trousers", "jeans", "long skirt")),
    ("lower_type", ("skirt", "long skirt")),
    ("upper_colour", ("black",)),
    ("upper_colour", ("white",)),
    ("upper_colour", ("red",)),
    ("upper_colour", ("purple",)),
    ("upper_colour", ("yellow",)),
    ("upper_colour", ("blue",)),
    ("upper_colour", ("green",)),
    ("upper_colour", ("grey",)),
    ("lower_colour", ("black",)),
    ("lower_colour", ("white",)),
    ("lower_colour", ("blue",)),
    ("lower_colour", ("green",)),
    ("lower_colour", ("grey",)),
    ("lower_colour", ("brown",)),
)


def mals_label(person: Person, seen: Seen) -> list[int]:
    """Return 27 answers: 1 yes, 0 no, -1 not to be seen in this picture."""
    label = []
    for attribute, values in _MALS_QUESTIONS:
        value = getattr(person, attribute)
        label.append(int(value in values) if attribute in seen.visible or value == ABSENT else -1)
    return label


SDA_LAYOUT = Layout("sda", ("data/sda", "images/SDA"), _place_sda, _sda_files)
MALS_LAYOUT = Layout("mals", ("MALS",), _place_mals, _mals_files)
