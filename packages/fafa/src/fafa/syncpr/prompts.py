"""What the models are asked, and which answers count. The paper's prompts are not published; these are this project's."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from tbps_common.pipeline.answers import Rejected, json_values

QUADRUPLE_KEYS = ("caption_1", "caption_2", "edit_1_to_2", "edit_2_to_1")

_QUADRUPLES = """\
You write training texts for a system that finds people in pictures of public cameras. Below are {count} people, one JSON \
object per line. "person" stays the same in both pictures; "picture_1" says what the first picture shows; "picture_2" lists \
only what is different in the second picture, everything else is as in the first.

For every person write four texts in English:
"caption_1": one or two sentences (15 to 40 words) that describe the first picture from head to foot: the person, the \
clothes, what they carry, the place. No names, no guesses about thoughts or profession.
"caption_2": the same for the second picture. It must be complete by itself: state again what has not changed, in other \
words where that reads well.
"edit_1_to_2": one short sentence (3 to 20 words) that tells what to change in the first picture to get the second. Name the \
changes only; do not describe the person again, and do not say what was there before.
"edit_2_to_1": the same in the other direction.

Vary sentence structure and choice of words from person to person, as different writers would.
Answer with a JSON array of {count} objects with exactly these four keys, in the order of the people, and nothing else.

{people}"""

# One wide picture, so that the model itself keeps both halves the same person.
IMAGE_TEMPLATE = (
    "A side-by-side pair of two full-length photographs of the same person, with the same face, build and hair, taken by "
    "public surveillance cameras, realistic. Left photograph: {caption_1} Right photograph: {caption_2}"
)

_QUESTIONS = """\
The two pictures were made for these two descriptions of one person:
Picture 1: {caption_1}
Picture 2: {caption_2}

Answer with one JSON object with exactly these four keys, each true or false, and nothing else:
"one_person_each": each picture shows exactly one person, in full length and without deformed limbs or a second body;
"picture_1_fits": picture 1 agrees with its description in gender, clothes, colours and belongings;
"picture_2_fits": picture 2 agrees with its description in gender, clothes, colours and belongings;
"same_person": face, hair and build of both pictures can belong to one and the same person."""
QUESTION_KEYS = ("one_person_each", "picture_1_fits", "picture_2_fits", "same_person")


def quadruple_messages(combinations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The question for several quadruples: one line of JSON per person."""
    people = "\n".join(json.dumps(combination, ensure_ascii=False) for combination in combinations)
    text = _QUADRUPLES.replace("{count}", str(len(combinations))).replace("{people}", people)
    return [{"role": "user", "content": text}]


def image_prompt(template: str, caption_1: str, caption_2: str) -> str:
    """The text-to-image prompt for a pair. Braces in a caption are just characters."""
    before, _, rest = template.partition("{caption_1}")
    between, _, after = rest.partition("{caption_2}")
    return f"{before}{caption_1}{between}{caption_2}{after}"


def question_messages(caption_1: str, caption_2: str, pictures: Sequence[str]) -> list[dict[str, Any]]:
    """The yes/no questions about a pair, with the two pictures as data URLs."""
    text = image_prompt(_QUESTIONS, caption_1, caption_2)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return [{"role": "user", "content": content}]


def fingerprint(prompt: str) -> str:
    """Short mark of a prompt, for the manifests."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


QUADRUPLE_PROMPT_MARK = fingerprint(_QUADRUPLES)
QUESTION_PROMPT_MARK = fingerprint(_QUESTIONS)

CAPTION_WORDS = (6, 80)
EDIT_WORDS = (2, 40)

_MALE = frozenset("man boy male gentleman he his him".split())
_FEMALE = frozenset("woman girl female lady she her hers".split())


def read_quadruples(answer: str, count: int) -> list[dict[str, str]]:
    """One entry per person that was asked about: the four texts, or the `reason` why they cannot be used.

    Raises:
        Rejected: none can be used, so that the whole request is worth asking again.
    """
    values = list(json_values(answer))
    lists = [value for value in values if isinstance(value, list) and any(isinstance(one, dict) for one in value)]
    # A model may wrap the array in an object, or answer for one person without an array.
    lists = lists or [_unwrapped(value) for value in values if isinstance(value, dict)]
    if not lists:
        raise Rejected("the answer holds no JSON array of objects")
    results = [_checked(entry) for entry in lists[-1][:count]]
    results += [{"reason": "missing from the answer"}] * (count - len(results))
    if all("reason" in result for result in results):
        raise Rejected(f"no quadruple of the answer can be used: {results[0]['reason']}")
    return results


def read_verdict(answer: str) -> dict[str, bool]:
    """The yes/no answers about a pair.

    Raises:
        Rejected: one of them is missing or neither true nor false.
    """
    found = [value for value in json_values(answer) if isinstance(value, dict)]
    if not found:
        raise Rejected("the answer holds no JSON object")
    missing = {key for key in QUESTION_KEYS if not isinstance(found[-1].get(key), bool)}
    if missing:
        raise Rejected(f"{min(missing)!r} is missing from the answer, or neither true nor false")
    return {key: found[-1][key] for key in QUESTION_KEYS}


def caption_key(text: str) -> str:
    """What makes a caption the same as another one: its words, whatever case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _unwrapped(value: dict[str, Any]) -> list[Any]:
    inner = [part for part in value.values() if isinstance(part, list)]
    return inner[0] if inner else [value]


def _checked(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in QUADRUPLE_KEYS):
        return {"reason": "not an object with the four texts"}
    texts = {key: re.sub(r"\s+", " ", entry[key]).strip() for key in QUADRUPLE_KEYS}
    for key, text in texts.items():
        least, most = CAPTION_WORDS if key.startswith("caption") else EDIT_WORDS
        if not least <= len(text.split()) <= most:
            return {"reason": "a text is too short or too long"}
        if not text.isprintable() or re.search(r"[{}<>\[\]|*#]|https?:", text):
            return {"reason": "a text holds markup or control characters"}
    keys = {key: caption_key(text) for key, text in texts.items()}
    if len(set(keys.values())) != len(keys):
        return {"reason": "two of the four texts are the same"}
    genders = [_gender(keys["caption_1"]), _gender(keys["caption_2"])]
    if None not in genders and genders[0] != genders[1]:
        return {"reason": "the captions disagree about the gender"}
    return texts


def _gender(words: str) -> str | None:
    """`male` or `female` if the caption says so and does not say both."""
    found = set(words.split())
    male, female = bool(found & _MALE), bool(found & _FEMALE)
    return None if male == female else "male" if male else "female"
