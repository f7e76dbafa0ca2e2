"""The words of the synthetic world: two to four synonyms for every value, and the noun phrases made of them.

No synonym stands for two values of one attribute, so every caption can be read back.
"""

from collections.abc import Sequence

import numpy as np

from tbps_world.synth.attributes import ABSENT, Person

COLOURS: dict[str, tuple[str, ...]] = {
    "black": ("black", "jet-black"),
    "white": ("white", "snow-white"),
    "grey": ("grey", "gray"),
    "red": ("red", "crimson"),
    "blue": ("blue", "azure"),
    "green": ("green", "emerald"),
    "yellow": ("yellow", "lemon"),
    "pink": ("pink", "rose"),
    "orange": ("orange", "tangerine"),
    "purple": ("purple", "violet"),
    "brown": ("brown", "chestnut"),
    "beige": ("beige", "tan", "khaki"),
    "blonde": ("blonde", "golden", "fair"),
}
"""Colour words; "blonde" is a colour of hair only."""

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": {"man": ("man", "gentleman", "guy"), "woman": ("woman", "lady", "female")},
    "age": {
        "young": ("young", "youthful"),
        "middle-aged": ("middle-aged", "mature"),
        "elderly": ("elderly", "old", "aged"),
    },
    "build": {
        "slim": ("slim", "thin", "slender"),
        "average": ("of average build", "of medium build"),
        "heavy": ("heavy", "stout", "heavyset"),
    },
    "hair_length": {
        "bald": ("a bald head", "a shaven head"),
        "short": ("short", "cropped"),
        "long": ("long", "shoulder-length"),
    },
    "hair_colour": {colour: COLOURS[colour] for colour in ("black", "brown", "blonde", "grey")},
    "upper_type": {
        "t-shirt": ("t-shirt", "tee"),
        "shirt": ("shirt", "button-up shirt"),
        "jacket": ("jacket", "windbreaker"),
        "coat": ("coat", "overcoat"),
        "hoodie": ("hoodie", "hooded sweatshirt"),
        "striped top": ("striped top", "stripy top", "striped jersey"),
    },
    "lower_type": {
        "trousers": ("trousers", "pants", "slacks"),
        "jeans": ("jeans", "denims"),
        "shorts": ("shorts", "knee-length shorts"),
        "skirt": ("skirt", "knee-length skirt"),
        "long skirt": ("long skirt", "maxi skirt"),
    },
    "shoes_type": {
        "sneakers": ("sneakers", "trainers", "running shoes"),
        "boots": ("boots", "high boots"),
        "sandals": ("sandals", "open shoes"),
    },
    "bag_type": {
        "backpack": ("backpack", "rucksack", "knapsack"),
        "handbag": ("handbag", "purse"),
        "shoulder bag": ("shoulder bag", "crossbody bag", "messenger bag"),
    },
    "headwear_type": {"cap": ("cap", "baseball cap"), "hat": ("hat", "brimmed hat")},
    "accessory": {
        "glasses": ("glasses", "spectacles", "eyeglasses"),
        "umbrella": ("umbrella", "folded umbrella"),
        "phone": ("phone", "mobile phone", "cellphone"),
    },
    **{
        f"{thing}_colour": {colour: COLOURS[colour] for colour in colours}
        for thing, colours in {
            "upper": ("black", "white", "grey", "red", "blue", "green", "yellow", "pink", "orange", "purple"),
            "lower": ("black", "white", "grey", "blue", "brown", "green", "beige", "red"),
            "shoes": ("black", "white", "red", "brown", "blue"),
            "bag": ("black", "red", "blue", "brown", "white"),
            "headwear": ("black", "red", "white", "blue"),
        }.items()
    },
}

GROUPS: dict[str, tuple[str, ...]] = {
    "person": ("gender", "age", "build"),
    "hair": ("hair_length", "hair_colour"),
    "upper": ("upper_type", "upper_colour"),
    "lower": ("lower_type", "lower_colour"),
    "shoes": ("shoes_type", "shoes_colour"),
    "bag": ("bag_type", "bag_colour"),
    "headwear": ("headwear_type", "headwear_colour"),
    "accessory": ("accessory",),
}
"""Attributes that one noun phrase states together."""

PRONOUNS = {"man": ("he", "his"), "woman": ("she", "her")}
PAIR = "a pair of"
HAIR = "hair"

_PLURAL = ("trousers", "jeans", "shorts")
_FAVOURITE_PERCENT = 70
"""Share of the first synonym: a vocabulary in which every word is equally rare takes long to learn."""


def say(attribute: str, value: str, generator: np.random.Generator) -> str:
    """Return one of the synonyms of a value, the first one most often."""
    words = SYNONYMS[attribute][value]
    if len(words) == 1 or int(generator.integers(100)) < _FAVOURITE_PERCENT:
        return words[0]
    return words[1 + int(generator.integers(len(words) - 1))]


def with_article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def person_phrase(person: Person, stated: Sequence[str], generator: np.random.Generator) -> str:
    """Return, for example, "a slim young woman", with the stated ones of gender, age and build."""
    words = []
    if "build" in stated and person.build != "average":
        words.append(say("build", person.build, generator))
    if "age" in stated:
        words.append(say("age", person.age, generator))
    words.append(say("gender", person.gender, generator))
    phrase = with_article(" ".join(words))
    if "build" in stated and person.build == "average":
        phrase += " " + say("build", person.build, generator)
    return phrase


def group_phrase(group: str, person: Person, stated: Sequence[str], generator: np.random.Generator) -> str:
    """Return the noun phrase of one group, for example "long brown hair", "a red coat" or "a pair of blue jeans".

    Args:
        group: a name of `GROUPS`; the person must have the thing.
        person: whose attributes are stated.
        stated: attributes to state; the colour may be left out, the type is always said.
        generator: chooses the synonyms.
    """
    if group == "person":
        return person_phrase(person, stated, generator)
    if group == "hair":
        length = say("hair_length", person.hair_length, generator)
        if person.hair_length == "bald":
            return length
        colour = say("hair_colour", person.hair_colour, generator) + " " if "hair_colour" in stated else ""
        return f"{length} {colour}{HAIR}"
    if group == "accessory":
        words = say("accessory", person.accessory, generator)
        return words if person.accessory == "glasses" else with_article(words)
    kind = f"{group}_type"
    words = say(kind, getattr(person, kind), generator)
    if f"{group}_colour" in stated:
        colour = say(f"{group}_colour", getattr(person, f"{group}_colour"), generator)
        words = f"{colour} {words}"
    if group == "shoes" or getattr(person, kind) in _PLURAL:
        return f"{PAIR} {words}" if int(generator.integers(100)) < 25 else words
    return with_article(words)


def has(person: Person, group: str) -> bool:
    """Whether the person has the thing of this group (a bald head counts as hair)."""
    return getattr(person, GROUPS[group][0]) != ABSENT


def vocabulary_phrases() -> list[str]:
    """Return every phrase of the tables, for the lexicon."""
    phrases = [words for values in SYNONYMS.values() for synonyms in values.values() for words in synonyms]
    pronouns = [word for words in PRONOUNS.values() for word in words]
    return [*phrases, *pronouns, PAIR, HAIR, "a", "an", "and"]
