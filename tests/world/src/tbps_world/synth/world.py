"""The world behind all layouts: its settings, its people and their splits, and the pictures that are drawn of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tbps_common.errors import InputError
from tbps_world.synth.attributes import Person, attribute_codes, sample_people
from tbps_world.synth.camera import View, sample_view
from tbps_world.synth.captions import Crowd
from tbps_world.synth.drawing import Drawing, draw
from tbps_world.synth.streams import stream

SPLITS = ("train", "val", "test")
PEOPLE_POOL = "people"
"""Pool of the pictures that CUHK-PEDES, ICFG-PEDES, RSTPReid, ChatPedes and the Diverse-Person folder share."""


@dataclass(frozen=True)
class Settings:
    """What decides every pixel and every word.

    Attributes:
        preset: name of the preset the settings started from.
        seed: seed of the world.
        train: number of training identities.
        val: number of validation identities.
        test: number of test identities.
        views: pictures per identity.
        height: pixels; pictures are half as wide.
        image_format: "png" or "jpg".
    """

    preset: str
    seed: int
    train: int
    val: int
    test: int
    views: int
    height: int
    image_format: str = "png"

    @property
    def width(self) -> int:
        return self.height // 2

    @property
    def people(self) -> int:
        return self.train + self.val + self.test


PRESETS = {
    "tiny": Settings("tiny", 0, 24, 8, 12, 4, 96),
    "small": Settings("small", 0, 400, 50, 100, 4, 128),
    "medium": Settings("medium", 0, 4000, 200, 400, 5, 256),
}


def resized(settings: Settings, people: int) -> Settings:
    """Return the settings with this many identities in all, split in the proportions of the settings.

    Raises:
        InputError: fewer than three identities.
    """
    if people < 3:
        raise InputError(f"--ids {people} leaves a split empty: give at least 3 identities (train, val and test).")
    val = max(1, people * settings.val // settings.people)
    test = max(1, people * settings.test // settings.people)
    values = {**settings.__dict__, "train": people - val - test, "val": val, "test": test}
    return Settings(**values)


@dataclass(frozen=True)
class Picture:
    """A picture to be drawn: a pool of pictures, a person as dressed in it, and the number of the view.

    Attributes:
        pool: name of the pool; the same view of the same person differs between pools.
        item: number or name of the person or record inside the pool.
        view: number of the view, which decides facing and scenery.
        person: who, as dressed in this picture.
        may_be_hidden: whether something may stand before the person.
    """

    pool: str
    item: int | str
    view: int
    person: Person
    may_be_hidden: bool = True

    @property
    def key(self) -> tuple[str, str, int]:
        return self.pool, str(self.item), self.view


@dataclass(frozen=True)
class World:
    """All people of one world. Number 0 is the first training identity; validation and test follow."""

    settings: Settings

    @cached_property
    def people(self) -> list[Person]:
        return sample_people(self.settings.people, stream(self.settings.seed, "world", "all", 0, "people"))

    @cached_property
    def codes(self) -> np.ndarray:
        """`[number of attributes, number of people]` uint8."""
        return np.ascontiguousarray(attribute_codes(self.people).T)

    def numbers(self, split: str) -> range:
        """Numbers of the people of a split."""
        settings = self.settings
        first = {"train": 0, "val": settings.train, "test": settings.train + settings.val}[split]
        return range(first, first + {"train": settings.train, "val": settings.val, "test": settings.test}[split])

    def crowd(self, split: str) -> Crowd:
        """The people of a split, as what a caption is compared with."""
        numbers = self.numbers(split)
        return Crowd(self.codes[:, numbers.start : numbers.stop])

    def splits(self, *splits: str) -> Iterator[tuple[str, int]]:
        """Yield (split, number) of all people of these splits, in order."""
        for split in splits:
            for number in self.numbers(split):
                yield split, number

    def picture(self, number: int, view: int, pool: str = PEOPLE_POOL) -> Picture:
        """A picture of a person in the clothes of the identity."""
        return Picture(pool, number, view, self.people[number])

    def stream(self, layout: str, item: int | str, view: int, purpose: str) -> np.random.Generator:
        """The random stream of one item, see `streams.stream`."""
        return stream(self.settings.seed, layout, item, view, purpose)


def camera_of(picture: Picture, seed: int) -> View:
    """Return the view parameters of a picture."""
    view = sample_view(picture.view, stream(seed, picture.pool, picture.item, picture.view, "camera"))
    return view if picture.may_be_hidden else View(**{**view.__dict__, "occluder": None})


def draw_picture(picture: Picture, settings: Settings) -> Drawing:
    """Draw a picture; the result depends on nothing but the arguments."""
    noise = stream(settings.seed, picture.pool, picture.item, picture.view, "noise")
    return draw(picture.person, camera_of(picture, settings.seed), settings.height, settings.width, noise)
