"""The persons of the start weights: drawn by the synthetic world, and none of them is in a world that a toy draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tbps_world.synth.attributes import MENTIONABLE, Person, attribute_codes, sample_people
from tbps_world.synth.camera import FACINGS
from tbps_world.synth.captions import Caption, Crowd, write_caption
from tbps_world.synth.drawing import Drawing
from tbps_world.synth.layouts.registry import LAYOUTS
from tbps_world.synth.streams import stream
from tbps_world.synth.world import PRESETS, Picture, Settings, World, camera_of, draw_picture, resized

SEED = 7919  # tbps-synth's seed of these persons' pictures; the toys draw worlds of seed 0, compare-toy one of seed 1
TOY_SEEDS = (0, 1)
TOY_IDENTITIES = (44, 100, 400, 550, 1100)
"""Identities of the worlds that the toys draw by default: presets tiny and small, and their `--ids`."""
DRESSING = ("syncpr", "itcpr")
"""Layouts that show people in other clothes than their own."""


@dataclass(frozen=True)
class Shot:
    """One picture of one person, and sentences about it.

    Attributes:
        number: of the person, from 0.
        person: as dressed in the picture.
        facing: "front", "back", "right" or "left".
        drawing: the picture `[height, height / 2, 3]` uint8, its part numbers, and what it shows.
        captions: of what the picture shows; no two are the same.
    """

    number: int
    person: Person
    facing: str
    drawing: Drawing
    captions: tuple[Caption, ...]


def start_people(count: int, seed: int = SEED) -> list[Person]:
    """Return people of whom nobody is described, with all that can be said, as anybody in the toys' worlds is.

    Raises:
        InputError: so many people cannot be told apart.
    """
    spare = 50  # more than were ever left out
    people = sample_people(count + spare, stream(seed, "start weights", "all", 0, "people"))
    return [person for person in people if described(person) not in toy_people()][:count]


def described(person: Person) -> tuple[str, ...]:
    """Everything a caption can say of a person."""
    return tuple(getattr(person, name) for name in MENTIONABLE)


@lru_cache(maxsize=1)
def toy_people() -> frozenset[tuple[str, ...]]:
    """`described` of everybody in a world that a toy draws, in all clothes that its layouts dress them in."""
    found: set[tuple[str, ...]] = set()
    for seed in TOY_SEEDS:
        # The people of a small world are the first ones of a large world of the same seed.
        found.update(map(described, World(replace(PRESETS["medium"], seed=seed)).people))
        for identities in TOY_IDENTITIES:
            world = World(resized(replace(PRESETS["small"], seed=seed), identities))
            found.update(
                described(place.picture.person) for layout in LAYOUTS.values() for place in layout.place(world)
            )
    return frozenset(found)


def shots(
    people: Sequence[Person],
    *,
    views: int = 2,
    height: int = 128,
    captions: int = 2,
    words: tuple[int, int] = (12, 45),
    seed: int = SEED,
    pool: str = "start weights",
) -> Iterator[Shot]:
    """Draw everybody, person after person.

    Args:
        people: whom; their captions tell them apart from each other.
        views: pictures of each: 4 show all sides, 2 front and right of one person, back and left of the next.
        height: of the pictures in pixels, even; they are half as wide.
        captions: of each picture.
        words: least and largest number of words of a caption.
        seed: of views, noise and words.
        pool: another name gives the same people other views, noise and words.
    """
    settings = Settings("start weights", seed, len(people), 0, 0, views, height)
    crowd = Crowd(attribute_codes(people).T.copy())
    for number, person in enumerate(people):
        for place in range(views):
            view = (number + place * max(1, len(FACINGS) // views)) % len(FACINGS) + place // len(FACINGS) * len(
                FACINGS
            )
            picture = Picture(pool, number, view, person)
            drawing, facing = draw_picture(picture, settings), camera_of(picture, seed).facing
            generator = stream(seed, pool, number, view, "captions")
            said: dict[str, Caption] = {}
            while len(said) < captions:
                caption = write_caption(person, drawing.seen, facing, generator, crowd, words=words)
                said.setdefault(caption.text, caption)
            yield Shot(number, person, facing, drawing, tuple(said.values()))
