"""Captions, edits and dialogues: true, readable back, and inside the lexicon."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from tbps_world.synth.attributes import ABSENT, ATTRIBUTES, SALIENT, VALUES, Person
from tbps_world.synth.captions import FRAMES, Caption, Crowd, fill, sentence_case, write_caption
from tbps_world.synth.dialogues import UNSURE, write_dialogue
from tbps_world.synth.drawing import Seen
from tbps_world.synth.edits import CHANGEABLE, change_outfit, redress, write_edit
from tbps_world.synth.lexicon import lexicon, words_of
from tbps_world.synth.streams import stream
from tbps_world.synth.vocabulary import GROUPS, SYNONYMS
from tbps_world.synth.world import PRESETS, World, camera_of, draw_picture

SMALL = World(PRESETS["small"])
LEXICON = set(lexicon())
Read = Callable[[str], dict[str, str]]


def look(numbers: range) -> list[tuple[int, int, Person, Seen, str]]:
    """(number, view, person, what is seen, facing) of these people in all views."""
    result = []
    for number in numbers:
        for view in range(4):
            picture = SMALL.picture(number, view)
            seen = draw_picture(picture, SMALL.settings).seen
            result.append((number, view, picture.person, seen, camera_of(picture, 0).facing))
    return result


@pytest.fixture(scope="module")
def shown() -> list[tuple[int, int, Person, Seen, str]]:
    """The test people of preset small."""
    return look(SMALL.numbers("test"))


def write(shown, **options) -> list[tuple[Person, Seen, Caption]]:
    crowd = SMALL.crowd("test")
    return [
        (person, seen, write_caption(person, seen, facing, stream(3, "text", number, view, "x"), crowd, **options))
        for number, view, person, seen, facing in shown
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"complete": False}, {"words": (23, 45), "least_stated": 8}, {"words": (30, 50), "least_stated": 9}],
    ids=["complete", "incomplete", "rstp", "icfg"],
)
def test_captions_state_visible_attributes_of_the_person_and_nothing_else(shown, read_caption: Read, options) -> None:
    least, most = options.get("words", (12, 45))
    for person, seen, caption in write(shown, **options):
        assert read_caption(caption.text) == caption.facts
        for attribute, value in caption.facts.items():
            assert value == getattr(person, attribute) != ABSENT
            assert attribute in seen.visible
        assert 4 <= len(caption.facts) <= 9
        if options.get("complete", True):
            assert len(caption.facts) >= 5
            assert {"upper_type", "upper_colour", "lower_type", "lower_colour"} <= set(caption.facts)
        assert least <= len(caption.text.split()) <= most
        assert caption.text.isascii() and caption.text[0].isupper() and caption.text.endswith(".")
        assert set(words_of(caption.text)) <= LEXICON


def test_captions_hardly_ever_fit_another_person_of_the_split(shown) -> None:
    crowd = SMALL.crowd("test")
    ambiguous = [
        crowd.fitting(caption.facts) > 1
        for complete in (True, False)
        for _, _, caption in write(shown, complete=complete)
    ]
    assert np.mean(ambiguous) <= 0.02


def test_a_linear_probe_from_the_true_attributes_retrieves(shown, read_caption: Read) -> None:
    """Sanity of the data: facts read from the captions, mapped linearly to attribute vectors, find their pictures."""
    places = {
        pair: place for place, pair in enumerate((name, value) for name in GROUPS_IN_ORDER for value in VALUES[name])
    }

    def vector(facts: dict[str, str]) -> np.ndarray:
        result = np.zeros(len(places) + 1)
        result[[places[pair] for pair in facts.items()]] = 1
        result[-1] = 1
        return result

    def pairs(split: str, shown) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stated, true, owners = [], [], []
        for number, view, person, seen, facing in shown:
            for complete in (True, False):
                generator = stream(8, "probe", number, view, f"{complete}")
                caption = write_caption(person, seen, facing, generator, SMALL.crowd(split), complete=complete)
                stated.append(vector(read_caption(caption.text)))
                true.append(vector({name: getattr(person, name) for name in GROUPS_IN_ORDER}))
                owners.append(number)
        return np.array(stated), np.array(true), np.array(owners)

    # For the training captions everything a person has counts as seen: that needs no drawing.
    training = [
        (
            number,
            view,
            person,
            Seen(frozenset(name for name in ATTRIBUTES if getattr(person, name) != ABSENT), {}, {}),
            "front",
        )
        for number, person in enumerate(SMALL.people[:400])
        for view in range(4)
    ]
    stated, true, _ = pairs("train", training)
    mapping = np.linalg.solve(stated.T @ stated + np.eye(stated.shape[1]), stated.T @ (true - true.mean(axis=0)))
    queries, gallery, owners = pairs("test", shown)
    features = gallery - true.mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    best = (queries @ mapping @ features.T).argmax(axis=1)
    assert np.mean(owners[best] == owners) > 0.95


GROUPS_IN_ORDER = [name for names in GROUPS.values() for name in names]


def test_every_frame_makes_sentences_with_and_without_its_optional_parts() -> None:
    assert len(FRAMES) >= 14 and len(set(FRAMES)) == len(FRAMES)
    slots = {
        "person": "a man",
        "hair": "short hair",
        "worn": "a red coat",
        "carried": "a bag",
        "he": "he",
        "his": "his",
    }
    for frame in FRAMES:
        full, short = fill(frame, slots), fill(frame, {**slots, "hair": "", "carried": ""})
        assert all(words in full for words in ("a man", "short hair", "a red coat", "a bag"))
        assert "a man" in short and "a red coat" in short
        for text in (full, short):
            assert not re.search(r"[\[\]{}]|  | ,| \.|,,|,\.|\.\.", text) and text.endswith(".")
            assert all(sentence[0].isupper() for sentence in sentence_case(text).split(". "))


def test_every_value_has_two_to_four_synonyms_of_its_own() -> None:
    for attribute, values in SYNONYMS.items():
        words = [word for synonyms in values.values() for word in synonyms]
        assert len(words) == len(set(words)), attribute
        assert all(2 <= len(synonyms) <= 4 for synonyms in values.values()), attribute


def test_spans_point_at_the_noun_phrases(shown) -> None:
    for _, _, caption in write(shown):
        for group in ("hair", "upper", "lower"):
            if group in caption.phrases:
                start, end = caption.span(group)
                assert caption.text[start:end].lower() == caption.phrases[group].lower()
                assert caption.text.lower().count(caption.phrases[group].lower()) == 1


def test_a_caption_prefers_facts_that_fit_one_person_only() -> None:
    person = SMALL.people[0]
    everything = Seen(frozenset(name for name in GROUPS_IN_ORDER if getattr(person, name) != ABSENT), {}, {})
    crowd = Crowd(np.repeat(SMALL.codes[:, :1], 5, axis=1))
    caption = write_caption(person, everything, "front", stream(0, "t", 0, 0, "x"), crowd)
    assert crowd.fitting(caption.facts) == 5  # nobody can tell copies apart, and the writer does not loop for ever
    assert SMALL.crowd("train").fitting({}) == 400


def test_outfit_changes_keep_the_person_and_always_change_what_they_name(read_caption: Read) -> None:
    kept = ("gender", "age", "build", "skin", "hair_length", "hair_colour", "accessory")
    counts = set()
    for number, person in enumerate(SMALL.people):
        generator = stream(2, "edit", number, 0, "x")
        target, changed = change_outfit(person, generator)
        counts.add(len(changed))
        assert all(getattr(target, name) == getattr(person, name) for name in kept)
        for group in CHANGEABLE:
            different = getattr(target, f"{group}_colour") != getattr(person, f"{group}_colour")
            assert different == (group in changed)
            assert group in changed or getattr(target, f"{group}_type") == getattr(person, f"{group}_type")
        text = write_edit(target, changed, generator)
        facts = {f"{group}_{aspect}" for group in changed for aspect in ("type", "colour")}
        assert read_caption(text) == {name: getattr(target, name) for name in facts}
        assert text[0].isupper() and text.endswith(".") and set(words_of(text)) <= LEXICON
        wrong = redress(target, changed, generator)
        assert all(getattr(wrong, f"{group}_colour") != getattr(target, f"{group}_colour") for group in changed)
    assert counts == {1, 2, 3}


def test_dialogues_ask_five_questions_and_answer_truly(shown, read_caption: Read) -> None:
    unsure = answers = 0
    orders = set()
    for number, view, person, seen, _ in shown:
        turns = write_dialogue(person, seen, stream(4, "talk", number, view, "x"))
        assert len(turns) == 5
        questions = []
        for question, answer in turns:
            assert (question["from"], answer["from"]) == ("gpt", "user")
            assert question["value"].endswith("?") and question["value"][0].isupper()
            assert set(words_of(question["value"] + answer["value"])) <= LEXICON
            for attribute, value in read_caption(answer["value"]).items():
                assert value == getattr(person, attribute) and attribute in seen.visible
            questions.append(question["value"])
        assert read_caption(turns[0][1]["value"])["upper_type"] == person.upper_type
        orders.add(tuple(questions))
        answers += 4
        unsure += sum(answer["value"] == UNSURE for _, answer in turns[1:])
    assert len(orders) > 100
    assert 0.05 < unsure / answers < 0.25


def test_an_absent_thing_is_denied_and_a_hidden_one_is_not(shown) -> None:
    person = next(person for person in SMALL.people if person.bag_type != ABSENT and person.headwear_type == ABSENT)
    hidden = Seen(frozenset({"gender", "build", "upper_type", "upper_colour", "lower_type", "lower_colour"}), {}, {})
    denied = set()
    for number in range(200):
        for question, answer in write_dialogue(person, hidden, stream(5, "talk", number, 0, "x"))[1:]:
            if "bag" in question["value"]:
                assert answer["value"] == UNSURE
            if "hat" in question["value"].split():
                denied.add(answer["value"])
    assert any(answer.startswith("No, ") for answer in denied)


def test_captions_fit_into_clips_77_tokens(shown) -> None:
    tokenizer = pytest.importorskip("open_clip").SimpleTokenizer()
    texts = [caption.text for _, _, caption in write(shown[:120], words=(30, 50), least_stated=9)]
    assert max(len(tokenizer.encode(text)) for text in texts) + 2 <= 77


def test_the_lexicon_is_sorted_and_keeps_hyphenated_words() -> None:
    words = lexicon()
    assert words == sorted(set(words)) and "t-shirt" in words and "middle-aged" in words
    assert 150 < len(words) < 400
    assert words_of("A T-shirt, worn.") == ["a", "t-shirt", "worn"]
    assert len(SALIENT) == 7
