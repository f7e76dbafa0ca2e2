"""Reading what a chat model answered: strict about content, patient with what models put around it."""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from fafa.syncpr.prompts import QUADRUPLE_KEYS, QUESTION_KEYS
from tbps_common.pipeline import Rejected

CAPTION_WORDS = (6, 80)
EDIT_WORDS = (2, 40)
_PLACES_TRIED = 16  # opening brackets at which the answer's JSON may begin

_MALE = frozenset("man boy male gentleman he his him".split())
_FEMALE = frozenset("woman girl female lady she her hers".split())


def read_quadruples(answer: str, count: int) -> list[dict[str, str] | str]:
    """One entry per person that was asked about: the four texts, or why they cannot be used.

    Raises:
        Rejected: none can be used, so that the whole request is worth asking again.
    """
    lists = (value for value in _json_values(answer) if isinstance(value, list))
    entries = next((value for value in lists if any(isinstance(entry, dict) for entry in value)), None)
    if entries is None:
        # A model may wrap the array in an object, or answer for one person without an array.
        entries = next((_unwrapped(value) for value in _json_values(answer) if isinstance(value, dict)), None)
    if entries is None:
        raise Rejected("the answer holds no JSON array of objects")
    results: list[dict[str, str] | str] = [_checked(entry) for entry in entries[:count]]
    results += ["missing from the answer"] * (count - len(results))
    if all(isinstance(result, str) for result in results):
        raise Rejected(f"no quadruple of the answer can be used: {results[0]}")
    return results


def read_verdict(answer: str) -> dict[str, bool]:
    """The yes/no answers about a pair.

    Raises:
        Rejected: one of them is missing or neither true nor false.
    """
    found = next((value for value in _json_values(answer) if isinstance(value, dict)), None)
    if found is None:
        raise Rejected("the answer holds no JSON object")
    for key in QUESTION_KEYS:
        if not isinstance(found.get(key), bool):
            raise Rejected(f"{key!r} is missing from the answer, or neither true nor false")
    return {key: found[key] for key in QUESTION_KEYS}


def caption_key(text: str) -> str:
    """What makes a caption the same as another one: its words, whatever case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _unwrapped(value: dict[str, Any]) -> list[Any]:
    inner = [part for part in value.values() if isinstance(part, list)]
    return inner[0] if inner else [value]


def _checked(entry: Any) -> dict[str, str] | str:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in QUADRUPLE_KEYS):
        return "not an object with the four texts"
    texts = {key: re.sub(r"\s+", " ", entry[key]).strip() for key in QUADRUPLE_KEYS}
    for key, text in texts.items():
        least, most = CAPTION_WORDS if key.startswith("caption") else EDIT_WORDS
        if not least <= len(text.split()) <= most:
            return "a text is too short or too long"
        if not text.isprintable() or re.search(r"[{}<>\[\]|*#]|https?:", text):
            return "a text holds markup or control characters"
    keys = {key: caption_key(text) for key, text in texts.items()}
    if len(set(keys.values())) != len(keys):
        return "two of the four texts are the same"
    genders = [_gender(keys["caption_1"]), _gender(keys["caption_2"])]
    if None not in genders and genders[0] != genders[1]:
        return "the captions disagree about the gender"
    return texts


def _gender(words: str) -> str | None:
    """`male` or `female` if the caption says so and does not say both."""
    found = set(words.split())
    male, female = bool(found & _MALE), bool(found & _FEMALE)
    return None if male == female else "male" if male else "female"


def _json_values(text: str) -> Iterator[Any]:
    """Values that begin at an opening bracket of the text, outermost first."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    place = 0
    for _ in range(_PLACES_TRIED):
        found = re.compile(r"[\[{]").search(text, place)
        if found is None:
            return
        try:
            value, place = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            place = found.start() + 1
            continue
        yield value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
