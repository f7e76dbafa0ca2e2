"""Outfit changes: the same person in other clothes, and the words that say what is new."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tbps_world.synth.attributes import ABSENT, VALUES, Person
from tbps_world.synth.captions import sentence_case, shuffled
from tbps_world.synth.vocabulary import group_phrase, has

CHANGEABLE = ("upper", "lower", "shoes", "bag", "headwear")
WEARING = ("wearing", "dressed in", "now wearing")
CARRYING = ("carrying", "holding")


def change_outfit(person: Person, generator: np.random.Generator) -> tuple[Person, tuple[str, ...]]:
    """Change the colour, and often the type, of one to three of `CHANGEABLE`.

    Face, hair, build and accessory stay. A changed bag or hat is always another one, never none, so that the text can
    say what is new.

    Returns:
        The person in the new outfit, and the changed groups.
    """
    order = shuffled(CHANGEABLE, generator)
    changed = tuple(order[: 1 + int(generator.integers(3))])
    return redress(person, changed, generator), changed


def redress(person: Person, changed: Sequence[str], generator: np.random.Generator) -> Person:
    """Return the person with another value of each of these groups; the colour always differs."""
    for group in changed:
        kind, colour = f"{group}_type", f"{group}_colour"
        colours = [value for value in VALUES[colour] if value not in (ABSENT, getattr(person, colour))]
        kinds = [value for value in VALUES[kind] if value != ABSENT]
        if group == "lower" and person.gender == "man":
            kinds = [value for value in kinds if "skirt" not in value]
        if not has(person, group) or int(generator.integers(100)) < 60:
            new_kind = kinds[int(generator.integers(len(kinds)))]
        else:
            new_kind = getattr(person, kind)
        new_colour = colours[int(generator.integers(len(colours)))]
        person = replace(person, **{kind: new_kind, colour: new_colour})
    return person


def write_edit(target: Person, changed: Sequence[str], generator: np.random.Generator) -> str:
    """Say what is new, for example "Wearing a gray skirt, carrying a black backpack."

    Args:
        target: the person in the new outfit.
        changed: the changed groups, at least one; only these are mentioned.
        generator: chooses words and order.
    """
    phrases = {group: group_phrase(group, target, (f"{group}_type", f"{group}_colour"), generator) for group in changed}
    parts = []
    worn = [phrases[group] for group in shuffled([group for group in changed if group != "bag"], generator)]
    if worn:
        lead = WEARING[int(generator.integers(len(WEARING)))]
        parts.append(f"{lead} {' and '.join(worn) if len(worn) < 3 else ', '.join(worn[:-1]) + ' and ' + worn[-1]}")
    if "bag" in phrases:
        parts.append(f"{CARRYING[int(generator.integers(len(CARRYING)))]} {phrases['bag']}")
    return sentence_case(", ".join(parts) + ".")


def edit_phrases() -> list[str]:
    """Return the fixed words of edit captions, for the lexicon."""
    return [*WEARING, *CARRYING]
