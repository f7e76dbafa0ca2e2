"""Dialogues about a person: an overall question first, then one attribute group a turn."""

from collections.abc import Sequence

import numpy as np

from tbps_world.synth.attributes import Person
from tbps_world.synth.captions import fill, sentence_case, shuffled
from tbps_world.synth.drawing import Seen
from tbps_world.synth.vocabulary import GROUPS, PRONOUNS, group_phrase, has, person_phrase

TURNS = 5
UNSURE = "I am not sure."
_UNSURE_PERCENT = 10

OPENINGS = (
    "can you describe the person you are looking for?",
    "who are you looking for?",
    "what does the person look like?",
)
OVERVIEWS = ("i am looking for {person} wearing {upper}.", "it is {person} in {upper}.", "{person} dressed in {upper}.")
QUESTIONS = {
    "upper": ("what is {he} wearing on the upper body?", "which kind of top does {he} wear?"),
    "lower": ("what is {he} wearing on the legs?", "what does {he} wear below the waist?"),
    "hair": ("what does {his} hair look like?", "how is {his} hair?"),
    "shoes": ("what shoes is {he} wearing?", "what does {he} have on {his} feet?"),
    "bag": ("is {he} carrying a bag?", "does {he} have a bag with {his} things?"),
    "headwear": ("is {he} wearing anything on {his} head?", "does {he} wear a hat or a cap?"),
    "accessory": ("does {he} have anything else with {his} clothes?", "is there anything else about {his} looks?"),
}
ANSWERS = {
    "worn": ("{he} is wearing {thing}.", "{he} has {thing} on.", "{thing}."),
    "hair": ("{he} has {thing}.",),
    "bag": ("yes, {he} is carrying {thing}.", "{he} has {thing}."),
    "headwear": ("yes, {he} is wearing {thing}.", "{he} has {thing} on."),
    "accessory": ("{he} has {thing}.",),
    "absent": ("no, {he} has none.", "no, nothing."),
}

Turn = list[dict[str, str]]


def write_dialogue(person: Person, seen: Seen, generator: np.random.Generator) -> list[Turn]:
    """Write five turns, each a question (from "gpt") and an answer (from "user").

    The overall description comes first, upper and lower garment are always asked for, the order of the rest is random.
    What the picture does not show, and now and then something it does show, is answered by "I am not sure."
    """
    he, his = PRONOUNS[person.gender]
    words = {"he": he, "his": his}
    upper = group_phrase("upper", person, _stated("upper", seen), generator)
    stated = [name for name in GROUPS["person"] if name in seen.visible and int(generator.integers(2))]
    slots = {**words, "person": person_phrase(person, ["gender", *stated], generator), "upper": upper}
    turns = [_turn(_one(OPENINGS, generator), fill(_one(OVERVIEWS, generator), slots))]
    others = shuffled([group for group in QUESTIONS if group not in ("upper", "lower")], generator)
    for group in shuffled(["upper", "lower", *others[: TURNS - 3]], generator):
        question = _one(QUESTIONS[group], generator).format(**words)
        turns.append(_turn(question, _answer(group, person, seen, words, generator)))
    return turns


def _answer(group: str, person: Person, seen: Seen, words: dict[str, str], generator: np.random.Generator) -> str:
    unsure = int(generator.integers(100)) < _UNSURE_PERCENT
    if not has(person, group):
        return UNSURE if unsure else _one(ANSWERS["absent"], generator).format(**words)
    stated = _stated(group, seen)
    if unsure or not stated:
        return UNSURE
    thing = group_phrase(group, person, stated, generator)
    return _one(ANSWERS.get(group, ANSWERS["worn"]), generator).format(**words, thing=thing)


def _stated(group: str, seen: Seen) -> list[str]:
    return [name for name in GROUPS[group] if name in seen.visible]


def _turn(question: str, answer: str) -> Turn:
    return [
        {"from": "gpt", "value": sentence_case(question)},
        {"from": "user", "value": answer if answer == UNSURE else sentence_case(answer)},
    ]


def _one(texts: Sequence[str], generator: np.random.Generator) -> str:
    return texts[int(generator.integers(len(texts)))]


def dialogue_phrases() -> list[str]:
    """Return the fixed words of dialogues, for the lexicon."""
    tables = [OPENINGS, OVERVIEWS, *QUESTIONS.values(), *ANSWERS.values()]
    return [UNSURE, *(text for table in tables for text in table)]
