"""What the chat model is asked, and which of its answers are no captions."""

from typing import Any

SHORTEST_REPLY = 30

# An answer that talks about the task instead of doing it.
REJECTED_PHRASES = (
    "sorry",
    "抱歉",
    "given prompt",
    "new prompt",
    "modified prompt",
    "translated prompt",
    "rewritten prompt",
    "created prompt",
    "updated prompt",
    "replace a commonly used requirement",
    "if the original problem can be solved with only a",
    "modify the given programming",
    "propose higher time or space complexity",
    "modify the programming test",
)
REJECTED_STARTS = ("modify the",)

_PROMPT = """\
Below is a sentence that describes a pedestrian, and a list of attributes that the pedestrian has now. Rewrite the \
sentence: wherever it mentions an attribute that one of the list corresponds to (hair, upper clothing, lower clothing, \
shoes, a bag and so on), put the listed one in its place. Keep everything else that the sentence says, and its style. \
Answer with the rewritten sentence only.

Sentence: {description}
Attributes: {attributes}
Rewritten sentence:"""


def build_prompt(row: dict[str, Any]) -> str:
    """The one user message for a row, as plain text.

    Args:
        row: `base_description`, a string; `reference_attribute_list`, a list of strings or one string.
    """
    attributes = row["reference_attribute_list"]
    listed = attributes if isinstance(attributes, str) else ", ".join(attributes)
    # No str.format: braces in a description are just characters.
    return _PROMPT.replace("{attributes}", listed, 1).replace("{description}", row["base_description"], 1)


def reject_response(reply: str) -> bool:
    """Whether a reply is no caption: too short, an apology, or an echo of the instruction."""
    text = reply.strip().lower()
    if len(text) < SHORTEST_REPLY or text.startswith(REJECTED_STARTS):
        return True
    return any(phrase in text for phrase in REJECTED_PHRASES)


def rejection_reason(reply: str) -> str:
    """In words, for the side file."""
    text = reply.strip().lower()
    if len(text) < SHORTEST_REPLY:
        return f"the answer is shorter than {SHORTEST_REPLY} characters"
    found = next((phrase for phrase in (*REJECTED_PHRASES, *REJECTED_STARTS) if phrase in text), "")
    return f"the answer is no caption: it says {found!r}"


def sentence_of(reply: str) -> str:
    """The caption in a reply: without space around it, and without quotation marks around the whole."""
    text = reply.strip()
    for opening, closing in (('"', '"'), ("“", "”")):
        inner = text[1:-1]
        if (
            len(text) > 1
            and text[0] == opening
            and text[-1] == closing
            and opening not in inner
            and closing not in inner
        ):
            return inner.strip()
    return text
