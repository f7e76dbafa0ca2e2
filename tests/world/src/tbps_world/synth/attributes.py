"""What makes one synthetic person: seventeen attributes, and the sampler that keeps people apart."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tbps_common.errors import InputError

ABSENT = "none"

VALUES: dict[str, tuple[str, ...]] = {
    "gender": ("man", "woman"),
    "age": ("young", "middle-aged", "elderly"),
    "build": ("slim", "average", "heavy"),
    "skin": ("light", "medium", "dark"),
    "hair_length": ("bald", "short", "long"),
    "hair_colour": (ABSENT, "black", "brown", "blonde", "grey"),
    "upper_type": ("t-shirt", "shirt", "jacket", "coat", "hoodie", "striped top"),
    "upper_colour": ("black", "white", "grey", "red", "blue", "green", "yellow", "pink", "orange", "purple"),
    "lower_type": ("trousers", "jeans", "shorts", "skirt", "long skirt"),
    "lower_colour": ("black", "white", "grey", "blue", "brown", "green", "beige", "red"),
    "shoes_type": ("sneakers", "boots", "sandals"),
    "shoes_colour": ("black", "white", "red", "brown", "blue"),
    "bag_type": (ABSENT, "backpack", "handbag", "shoulder bag"),
    "bag_colour": (ABSENT, "black", "red", "blue", "brown", "white"),
    "headwear_type": (ABSENT, "cap", "hat"),
    "headwear_colour": (ABSENT, "black", "red", "white", "blue"),
    "accessory": (ABSENT, "glasses", "umbrella", "phone"),
}
ATTRIBUTES = tuple(VALUES)
MENTIONABLE = tuple(name for name in ATTRIBUTES if name != "skin")
SALIENT = ("upper_type", "upper_colour", "lower_type", "lower_colour", "bag_type", "bag_colour", "hair_length")
"""The attributes a look at the whole figure settles; any two people differ in at least two of them."""

MIN_MENTIONABLE_DISTANCE = 3
MIN_SALIENT_DISTANCE = 2
_PATIENCE = 20_000


@dataclass(frozen=True, slots=True)
class Person:
    """One identity. Absent things (no bag, bald head) have the value "none"."""

    gender: str
    age: str
    build: str
    skin: str
    hair_length: str
    hair_colour: str
    upper_type: str
    upper_colour: str
    lower_type: str
    lower_colour: str
    shoes_type: str
    shoes_colour: str
    bag_type: str
    bag_colour: str
    headwear_type: str
    headwear_colour: str
    accessory: str

    def codes(self) -> tuple[int, ...]:
        """Positions of the values in `VALUES`, in the order of `ATTRIBUTES`."""
        return tuple(VALUES[field.name].index(getattr(self, field.name)) for field in fields(self))


def attribute_codes(people: Sequence[Person]) -> np.ndarray:
    """Return the codes of all people, `[number of people, number of attributes]` uint8."""
    return np.array([person.codes() for person in people], dtype=np.uint8).reshape(len(people), len(ATTRIBUTES))


def sample_people(count: int, generator: np.random.Generator) -> list[Person]:
    """Draw people of whom any two differ in at least 3 mentionable and at least 2 salient attributes.

    Args:
        count: number of people.
        generator: source of all randomness.

    Raises:
        InputError: so many people cannot be told apart by these attributes.
    """
    mentionable = [ATTRIBUTES.index(name) for name in MENTIONABLE]
    salient = [ATTRIBUTES.index(name) for name in SALIENT]
    # One row per attribute: the comparison with everybody accepted so far then runs over contiguous memory.
    accepted = np.zeros((len(ATTRIBUTES), count), dtype=np.uint8)
    accepted_salient = np.zeros((len(SALIENT), count), dtype=np.uint8)
    people: list[Person] = []
    rejected_in_a_row = 0
    while len(people) < count:
        person = _draw_person(generator)
        place, codes = len(people), np.array(person.codes(), dtype=np.uint8)
        far = _least_difference(accepted_salient[:, :place], codes[salient]) >= MIN_SALIENT_DISTANCE
        if far and _least_difference(accepted[mentionable, :place], codes[mentionable]) >= MIN_MENTIONABLE_DISTANCE:
            accepted[:, place], accepted_salient[:, place] = codes, codes[salient]
            people.append(person)
            rejected_in_a_row = 0
            continue
        rejected_in_a_row += 1
        if rejected_in_a_row == _PATIENCE:
            raise InputError(
                f"Only {len(people)} people who differ in enough visible attributes were found, {count} were asked for: "
                "give a smaller --ids."
            )
    return people


def _least_difference(others: np.ndarray, codes: np.ndarray) -> int:
    """Return in how many places the codes differ from the nearest of the others, `[places, number of others]`."""
    differing = np.add.reduce(others != codes[:, None], axis=0, dtype=np.uint8)
    return int(differing.min(initial=len(codes)))


def _draw_person(generator: np.random.Generator) -> Person:
    """Draw one person; the only correlations are those that plausibility asks for."""
    lower_type = _pick(generator, VALUES["lower_type"], (22, 22, 20, 18, 18))
    skirt = lower_type in ("skirt", "long skirt")
    # 9 of 10 skirts are worn by women; the share among the others is chosen to leave the genders about even.
    woman = _chance(generator, 90 if skirt else 28)
    age = _pick(generator, VALUES["age"], (45, 30, 25))
    hair_length = _pick(generator, VALUES["hair_length"], (0, 35, 65) if woman else (20, 60, 20))
    hair_colour = _pick(generator, VALUES["hair_colour"][1:], (15, 10, 5, 70) if age == "elderly" else (32, 32, 30, 6))
    bag_type = _pick(generator, VALUES["bag_type"], (25, 25, 25, 25))
    bag_colour = _pick(generator, VALUES["bag_colour"][1:])
    headwear_type = _pick(generator, VALUES["headwear_type"], (60, 20, 20))
    headwear_colour = _pick(generator, VALUES["headwear_colour"][1:])
    return Person(
        gender="woman" if woman else "man",
        age=age,
        build=_pick(generator, VALUES["build"], (33, 40, 27)),
        skin=_pick(generator, VALUES["skin"]),
        hair_length=hair_length,
        hair_colour=ABSENT if hair_length == "bald" else hair_colour,
        upper_type=_pick(generator, VALUES["upper_type"]),
        upper_colour=_pick(generator, VALUES["upper_colour"]),
        lower_type=lower_type,
        lower_colour=_pick(generator, VALUES["lower_colour"]),
        shoes_type=_pick(generator, VALUES["shoes_type"], (40, 35, 25)),
        shoes_colour=_pick(generator, VALUES["shoes_colour"]),
        bag_type=bag_type,
        bag_colour=ABSENT if bag_type == ABSENT else bag_colour,
        headwear_type=headwear_type,
        headwear_colour=ABSENT if headwear_type == ABSENT else headwear_colour,
        accessory=_pick(generator, VALUES["accessory"], (34, 24, 21, 21)),
    )


def _pick(generator: np.random.Generator, values: Sequence[str], weights: Sequence[int] | None = None) -> str:
    if weights is None:
        return values[int(generator.integers(len(values)))]
    ticket = int(generator.integers(sum(weights)))
    for value, weight in zip(values, weights):
        if ticket < weight:
            return value
        ticket -= weight
    raise AssertionError("the weights cover every ticket")


def _chance(generator: np.random.Generator, percent: int) -> bool:
    return int(generator.integers(100)) < percent
