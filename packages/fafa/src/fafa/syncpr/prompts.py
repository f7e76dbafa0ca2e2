"""What the models are asked. The paper's own prompts are not published; these are this project's."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

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
