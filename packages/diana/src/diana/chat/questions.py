"""Questions about a person's looks, with answers a witness might give: what the offline questioner chooses from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("black", "white", "grey", "red", "blue", "green", "yellow", "pink", "orange", "purple", "brown")


@dataclass(frozen=True)
class Question:
    """A question on one topic.

    Attributes:
        topic: what it is about; a topic is asked at most once.
        text: the question.
        answers: what might be answered, different enough to tell persons apart.
        words: show, in an answer, that the topic has been settled.
    """

    topic: str
    text: str
    answers: tuple[str, ...]
    words: tuple[str, ...]


QUESTIONS = (
    Question(
        "upper body",
        "What was the person wearing on the upper body?",
        tuple(f"{'An' if colour[0] in 'aeiou' else 'A'} {colour} top." for colour in _COLOURS),
        ("top", "shirt", "t-shirt", "tee", "jacket", "coat", "hoodie", "sweater", "jersey", "dress", "blouse", "vest"),
    ),
    Question(
        "lower body",
        "What was the person wearing on the legs?",
        tuple(f"{colour.capitalize()} {garment}." for garment in ("trousers", "shorts") for colour in _COLOURS[:5])
        + ("Blue jeans.", "A short skirt.", "A long skirt."),
        ("trousers", "pants", "slacks", "jeans", "denims", "shorts", "skirt", "leggings"),
    ),
    Question(
        "gender",
        "Was the person a man or a woman?",
        ("A man.", "A woman."),
        ("man", "woman", "boy", "girl", "male", "female", "lady", "gentleman", "guy", "he", "she"),
    ),
    Question(
        "hair",
        "What did the person's hair look like?",
        (
            "Short black hair.",
            "Long black hair.",
            "Short brown hair.",
            "Long brown hair.",
            "Blonde hair.",
            "Grey hair.",
            "A bald head.",
        ),
        ("hair", "bald", "shaven", "ponytail"),
    ),
    Question(
        "bag",
        "Was the person carrying a bag?",
        ("No, no bag.", "Yes, a backpack.", "Yes, a handbag.", "Yes, a shoulder bag."),
        ("bag", "backpack", "rucksack", "knapsack", "handbag", "purse", "suitcase"),
    ),
    Question(
        "shoes",
        "What shoes was the person wearing?",
        ("Black shoes.", "White sneakers.", "Red sneakers.", "Brown boots.", "Black boots.", "Sandals."),
        ("shoes", "sneakers", "trainers", "boots", "sandals", "heels"),
    ),
    Question(
        "headwear",
        "Was the person wearing anything on the head?",
        ("No, nothing.", "A black cap.", "A white cap.", "A red hat.", "A hat."),
        ("cap", "hat", "helmet", "hood"),
    ),
    Question(
        "accessories",
        "Did the person have glasses, an umbrella or a phone?",
        ("No.", "Glasses.", "An umbrella.", "A phone in the hand."),
        ("glasses", "spectacles", "umbrella", "phone", "cellphone", "watch", "scarf"),
    ),
    Question(
        "age and build",
        "How old was the person, and of which build?",
        ("Young and slim.", "Young and of average build.", "Middle-aged.", "Elderly.", "Heavy."),
        ("young", "youthful", "middle-aged", "elderly", "old", "slim", "thin", "stout", "heavy", "build"),
    ),
)


def open_questions(rounds: Sequence[Sequence[dict[str, str]]]) -> list[Question]:
    """The questions whose topic has come up neither in a question (a language model words it otherwise) nor in an answer.

    Args:
        rounds: of the dialogue so far.
    """
    asked = {message["value"] for messages in rounds for message in messages if message["from"] == "gpt"}
    said = {
        word
        for messages in rounds
        for message in messages
        for word in re.findall(r"[a-z]+(?:-[a-z]+)*", message["value"].lower())
    }
    return [q for q in QUESTIONS if q.text not in asked and not said & set(q.words)]
