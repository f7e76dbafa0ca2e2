"""The sampler: people who can be told apart, and are plausible."""

import numpy as np
import pytest

from tbps_common.errors import InputError
from tbps_world.synth import attributes
from tbps_world.synth.attributes import (
    ABSENT,
    ATTRIBUTES,
    MENTIONABLE,
    SALIENT,
    VALUES,
    attribute_codes,
    sample_people,
)
from tbps_world.synth.streams import stream
from tbps_world.synth.world import PRESETS, World


@pytest.fixture(scope="module")
def medium() -> World:
    return World(PRESETS["medium"])


def smallest_distance(codes: np.ndarray, names: tuple[str, ...]) -> int:
    columns = codes[:, [ATTRIBUTES.index(name) for name in names]]
    smallest = len(names)
    for row in range(len(columns) - 1):
        smallest = min(smallest, int((columns[row] != columns[row + 1 :]).sum(axis=1).min()))
    return smallest


@pytest.mark.parametrize("preset", ["tiny", "small", "medium"])
def test_any_two_people_of_a_preset_can_be_told_apart(preset: str, medium: World) -> None:
    world = medium if preset == "medium" else World(PRESETS[preset])
    codes = attribute_codes(world.people)
    assert len(codes) == PRESETS[preset].people
    assert smallest_distance(codes, MENTIONABLE) >= 3
    assert smallest_distance(codes, SALIENT) >= 2


def test_every_value_occurs_and_absent_things_have_no_colour() -> None:
    people = World(PRESETS["small"]).people
    for name, values in VALUES.items():
        assert {getattr(person, name) for person in people} == set(values)
    for person in people:
        assert (person.hair_length == "bald") == (person.hair_colour == ABSENT)
        assert (person.bag_type == ABSENT) == (person.bag_colour == ABSENT)
        assert (person.headwear_type == ABSENT) == (person.headwear_colour == ABSENT)


def test_only_men_are_bald_and_nine_of_ten_skirts_are_worn_by_women(medium: World) -> None:
    people = medium.people
    assert {person.gender for person in people if person.hair_length == "bald"} == {"man"}
    skirts = [person.gender == "woman" for person in people if "skirt" in person.lower_type]
    # In a crowded world refused doubles pull the share of 0.9 down a little.
    assert 0.84 < np.mean(skirts) < 0.94
    assert 0.4 < np.mean([person.gender == "woman" for person in people]) < 0.6


def test_a_larger_world_begins_with_the_same_people() -> None:
    few = sample_people(30, stream(5, "world", "all", 0, "people"))
    many = sample_people(60, stream(5, "world", "all", 0, "people"))
    assert many[:30] == few
    assert sample_people(30, stream(6, "world", "all", 0, "people")) != few


def test_too_many_people_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "_PATIENCE", 3)
    with pytest.raises(InputError, match="smaller --ids"):
        sample_people(5000, stream(0, "world", "all", 0, "people"))


def test_streams_differ_by_every_part_of_their_name() -> None:
    names = [
        (0, "a", 1, 2, "x"),
        (1, "a", 1, 2, "x"),
        (0, "b", 1, 2, "x"),
        (0, "a", 2, 2, "x"),
        (0, "a", 1, 3, "x"),
        (0, "a", 1, 2, "y"),
    ]
    firsts = {int(stream(*name).integers(1 << 60)) for name in names}
    assert len(firsts) == len(names)
    assert int(stream(*names[0]).integers(1 << 60)) in firsts
