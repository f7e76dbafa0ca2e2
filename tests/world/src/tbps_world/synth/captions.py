"""Captions: which attributes a sentence states, and the sentence frames they are put into."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tbps_world.synth.attributes import ATTRIBUTES, VALUES, Person
from tbps_world.synth.drawing import Seen
from tbps_world.synth.vocabulary import GROUPS, PRONOUNS, group_phrase, has

FRAMES = (
    "{person}[ with {hair}] is wearing {worn}[ and carrying {carried}].",
    "{person} wears {worn}[ and has {hair}][. {he} is carrying {carried}].",
    "wearing {worn}, {person}[ with {hair}] is walking[ with {carried}].",
    "{person} dressed in {worn} walks along[, carrying {carried}][. {he} has {hair}].",
    "this is {person} in {worn}[, carrying {carried}][. {he} has {hair}].",
    "the pedestrian is {person}[ with {hair}] who is dressed in {worn}[ and holds {carried}].",
    "{person} in {worn} is walking along the street[ carrying {carried}][. {he} has {hair}].",
    "in the picture, {person}[ with {hair}] has {worn} on[ and carries {carried}].",
    "there is {person}[ with {hair}] wearing {worn}[ and holding {carried}].",
    "{person} is walking by[, carrying {carried}]. {he} is dressed in {worn}[ and has {hair}].",
    "[with {hair}, ]{person} walks past in {worn}[ and carries {carried}].",
    "[carrying {carried}, ]{person}[ with {hair}] is wearing {worn}.",
    "{person} has {worn} on[, carries {carried}][ and has {hair}].",
    "seen here is {person}[ with {hair}], dressed in {worn}[ and carrying {carried}].",
    "{person} is out for a walk in {worn}[, with {carried}][. {he} has {hair}].",
    "the camera shows {person}[ with {hair}] wearing {worn}[. {he} carries {carried}].",
)
"""Sentence frames. What stands in brackets is left out when its slot is empty."""

PLACES = {
    "upper": ("on {his} upper body",),
    "lower": ("on {his} legs", "below the waist"),
    "shoes": ("on {his} feet",),
    "headwear": ("on {his} head",),
    "bag": ("by {his} side",),
    "backpack": ("on {his} back",),
    "glasses": ("on {his} nose",),
}
"""Where things are worn; long captions say it."""

TAILS: dict[str, tuple[str, ...]] = {
    "front": ("{he} is facing the camera", "{he} is seen from the front and walks towards the camera"),
    "back": ("{he} is seen from behind", "{he} has turned away and walks off from the camera"),
    "right": ("{he} is seen from the side and walks to the right", "{he} is walking to the right of the picture"),
    "left": ("{he} is seen from the side and walks to the left", "{he} is walking to the left of the picture"),
    "any": ("the picture was taken by a camera at the side of the street",),
}
"""Closing sentences of long captions, by facing."""

MIN_STATED, MAX_STATED = 5, 9
_ATTEMPTS = 16
_LONG = 20
"""Captions that need more words than this also say where things are worn."""
_WEIGHTS = {"hair": 8, "bag": 8, "headwear": 7, "shoes": 6, "accessory": 5, "age": 3, "build": 2}
"""How early each optional group is chosen, relative to the others."""


@dataclass(frozen=True)
class Caption:
    """A caption and what it says.

    Attributes:
        text: the sentence(s).
        facts: value of each attribute that the text states.
        phrases: noun phrase of each group of `GROUPS` that the text holds.
    """

    text: str
    facts: dict[str, str]
    phrases: dict[str, str]

    def span(self, group: str) -> tuple[int, int]:
        """Return start and end of the group's noun phrase in the text, in characters."""
        start = self.text.lower().index(self.phrases[group].lower())
        return start, start + len(self.phrases[group])


@dataclass(frozen=True)
class Crowd:
    """The people a caption should tell its person apart from.

    Attributes:
        codes: `[number of attributes, number of people]` uint8, see `attribute_codes` (transposed).
    """

    codes: np.ndarray

    def fitting(self, facts: dict[str, str]) -> int:
        """Return how many of the people have all of these attributes."""
        fits = np.ones(self.codes.shape[1], dtype=bool)
        for attribute, value in facts.items():
            fits &= self.codes[ATTRIBUTES.index(attribute)] == VALUES[attribute].index(value)
        return int(fits.sum())


def write_caption(
    person: Person,
    seen: Seen,
    facing: str,
    generator: np.random.Generator,
    crowd: Crowd,
    *,
    complete: bool = True,
    words: tuple[int, int] = (12, 45),
    least_stated: int = MIN_STATED,
) -> Caption:
    """Write one caption of what a picture shows.

    Args:
        person: who is shown.
        seen: what can be seen; nothing else is mentioned.
        facing: from where the person is seen.
        generator: source of all choices.
        crowd: the people of the same split; a set of attributes that fits only one of them is preferred.
        complete: whether type and colour of upper and lower garment are all stated; otherwise one or two may be missing.
        words: least and largest number of words.
        least_stated: number of attributes to state at least, if so many can be seen.
    """
    best: list[str] = []
    fewest = 0
    for attempt in range(_ATTEMPTS):
        stated = _choose(person, seen, generator, complete, MAX_STATED if attempt >= 4 else least_stated)
        others = crowd.fitting({attribute: getattr(person, attribute) for attribute in stated})
        if not best or others < fewest:
            best, fewest = stated, others
        if fewest <= 1:
            break
    for _ in range(_ATTEMPTS * _ATTEMPTS):
        caption = _phrase(person, best, facing, generator, words[0])
        if words[0] <= len(caption.text.split()) <= words[1]:
            return caption
    raise RuntimeError(f"no frame holds {best} in {words[0]} to {words[1]} words")


def _choose(person: Person, seen: Seen, generator: np.random.Generator, complete: bool, least_stated: int) -> list[str]:
    """Choose the attributes to state: 5 to 9 of the visible ones."""
    stated = ["gender", *(name for name in (*GROUPS["upper"], *GROUPS["lower"]) if name in seen.visible)]
    if not complete and int(generator.integers(100)) < 35:
        for name in (("upper_colour",), ("lower_colour",), ("lower_type", "lower_colour"))[int(generator.integers(3))]:
            if name in stated:
                stated.remove(name)
    # Eight or nine in most captions: the more a caption says, the fewer people it fits.
    target = max(least_stated, (5, 6, 7, 8, 8, 9, 9, 9, 9, 9)[int(generator.integers(10))])
    weights = {
        name: weight
        for name, weight in _WEIGHTS.items()
        if (name in seen.visible if name in ("age", "build") else GROUPS[name][0] in seen.visible)
    }
    while weights and len(stated) < target:
        names = list(weights)
        name = names[_weighted(generator, list(weights.values()))]
        del weights[name]
        members = (name,) if name in ("age", "build") else GROUPS[name]
        for member in members:
            if member in seen.visible and len(stated) < MAX_STATED:
                stated.append(member)
    return stated


def _phrase(
    person: Person, stated: Sequence[str], facing: str, generator: np.random.Generator, least_words: int
) -> Caption:
    """Put the attributes into noun phrases and these into a frame; long captions also say where things are worn."""
    he, his = PRONOUNS[person.gender]
    phrases = {
        group: group_phrase(group, person, stated, generator)
        for group, names in GROUPS.items()
        if any(name in stated for name in names) and has(person, group)
    }
    extended = dict(phrases)
    if least_words > _LONG:
        for group in ("upper", "lower", "shoes", "headwear", "bag", "accessory"):
            place = PLACES.get({"bag": person.bag_type, "accessory": person.accessory}.get(group, group))
            place = PLACES["bag"] if group == "bag" and place is None else place
            if group in phrases and place is not None and int(generator.integers(100)) < 60:
                extended[group] += " " + place[int(generator.integers(len(place)))].format(his=his)
    carried = [group for group in ("bag", "accessory") if group in phrases]
    worn = [group for group in ("upper", "lower", "shoes", "headwear") if group in phrases]
    if person.accessory == "glasses" and "accessory" in carried:
        carried.remove("accessory")
        worn.append("accessory")
    slots = {
        "person": phrases["person"],
        "hair": phrases.get("hair", ""),
        "worn": _enumerate([extended[group] for group in shuffled(worn, generator)]),
        "carried": _enumerate([extended[group] for group in shuffled(carried, generator)]),
        "he": he,
        "his": his,
    }
    text = fill(FRAMES[int(generator.integers(len(FRAMES)))], slots)
    if least_words > _LONG:
        # Mostly only as many closing sentences as the length asks for: they say nothing about who it is.
        tails = shuffled((*TAILS[facing], *TAILS["any"]), generator)
        closing = 1 if int(generator.integers(100)) < 30 else 0
        while tails and (closing > 0 or len(text.split()) < least_words):
            text += " " + fill(tails.pop() + ".", slots)
            closing -= 1
    return Caption(sentence_case(text), {name: getattr(person, name) for name in stated}, phrases)


def fill(frame: str, slots: dict[str, str]) -> str:
    """Fill the slots of a frame; a bracketed part whose slot is empty is left out."""

    def part(match: re.Match[str]) -> str:
        inside = match.group(1)
        names = [name for name in re.findall(r"\{(\w+)\}", inside) if name not in ("he", "his")]
        return inside if all(slots[name] for name in names) else ""

    return re.sub(r"\[([^\]]*)\]", part, frame).format(**slots)


def sentence_case(text: str) -> str:
    """Raise the first letter of every sentence."""
    return re.sub(r"(^|\. )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


def shuffled(items: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Return the items in random order."""
    return [items[int(place)] for place in generator.permutation(len(items))]


def _enumerate(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + (" and " + phrases[-1] if phrases else "")


def _weighted(generator: np.random.Generator, weights: Sequence[int]) -> int:
    ticket = int(generator.integers(sum(weights)))
    for place, weight in enumerate(weights):
        if ticket < weight:
            return place
        ticket -= weight
    raise AssertionError("the weights cover every ticket")


def frame_phrases() -> list[str]:
    """Return the fixed words of all frames, for the lexicon."""
    texts = [
        *FRAMES,
        *(place for places in PLACES.values() for place in places),
        *(t for ts in TAILS.values() for t in ts),
    ]
    return [re.sub(r"\{\w+\}|[\[\].,]", " ", text) for text in texts]
