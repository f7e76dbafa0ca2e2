"""What the chat model is asked, and which of its answers are not captions."""

import re
from typing import Any

SHORTEST_REPLY = 30

# An answer that talks about the task instead of doing it, or gives the instruction back.
_NOT_A_CAPTION = re.compile(
    r"sorry|抱歉"
    r"|\bprompts?\b"
    r"|rewritten sentence|list of attributes|the listed one"
    r"|(?:^|[.!?:]\s+)(?:please\s+)?(?:modify|rewrite|replace|propose|put|keep|answer|if)\b",
    re.IGNORECASE,
)
_CUE = "Rewritten sentence:"

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
    """Whether a reply is not a caption: too short, an apology, or talk about the instruction."""
    return bool(rejection_reason(reply))


def rejection_reason(reply: str) -> str:
    """Why a reply is not a caption, for the side file; empty for a caption."""
    text = reply.strip()
    if len(text) < SHORTEST_REPLY:
        return f"the answer is shorter than {SHORTEST_REPLY} characters"
    found = _NOT_A_CAPTION.search(text)
    return f"the answer is not a caption: it says {found[0].lower()!r}" if found else ""


def sentence_of(reply: str) -> str:
    """The caption in a reply: without the prompt's last words, space around it, or quotation marks around the whole."""
    text = reply.strip()
    if text.lower().startswith(_CUE.lower()):
        text = text[len(_CUE) :].strip()
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
