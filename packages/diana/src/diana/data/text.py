"""Dialogues as the text the model reads. The constants are part of the trained input distribution, to the byte."""

import re
from collections.abc import Sequence
from typing import Any

from tbps_common.datasets.chatpedes import turn_problem
from tbps_common.errors import InputError

Message = dict[str, str]
Round = list[Message]
Chat = list[Round]

SYSTEM_PROMPT = (
    "You are an intelligent system designed to retrieve pedestrian images from dialogues. Extract key attributes such as "
    "clothing, accessories, gender, and distinctive features from the conversation. Use the aggregated information from "
    "all dialogue turns to perform accurate person image retrieval."
)
AFTER_SYSTEM = "\n\n"
"""What stands between the system text and the first message."""

CAPTION_BUDGETS = ("caption", "total")
"""What the limit of a caption's tokens counts: its own, or the system text too."""

ROLES = {"gpt": "ASSISTANT", "user": "USER"}
PROMPT_POOL = (
    "Please describe the person you saw.",
    "What is the person wearing in the picture?",
    "Can you detail the clothing and accessories of the person?",
    "Describe the appearance of the individual in the image.",
    "How would you describe the attire of the person in the image?",
    "Please provide details about the person's outfit.",
    "Describe the attire and notable features of the individual in the picture.",
)

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_WHITESPACE = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int) -> str:
    """A caption in lower case without `.!"()*#:;~`, cut after `max_words` words."""
    text = _WHITESPACE.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def render_dialogue(rounds: Sequence[Round], turn_limit: int = -1) -> str:
    """The text of a dialogue: system text, then `ROLE: value` lines.

    Args:
        rounds: each a list of messages `{"from": "gpt" | "user", "value": text}` that starts with the assistant and
            alternates; it may end with the assistant.
        turn_limit: keep the first n rounds if above 0.

    Returns:
        Text without trailing whitespace; empty if there is no message.

    Raises:
        InputError: the messages of a round do not alternate, or a speaker is unknown.
    """
    rounds = rounds[:turn_limit] if turn_limit > 0 else rounds
    lines = []
    for number, messages in enumerate(rounds):
        problem = turn_problem(messages)
        if problem is not None:
            raise InputError(f"Round {number} (counted from 0) of a dialogue {problem}.")
        lines.extend(f"{ROLES[message['from']]}: {message['value']}\n" for message in messages)
    return f"{SYSTEM_PROMPT}{AFTER_SYSTEM}{''.join(lines)}".rstrip() if lines else ""


def render_caption(caption: str, prompt: str) -> str:
    """A cleaned caption as the answer to one question."""
    return render_dialogue([[{"from": "gpt", "value": prompt}, {"from": "user", "value": caption}]])


def prefix_length(tokenizer: Any) -> int:
    """Tokens before the first message of every dialogue, the start token included (48 with Llama-3.2)."""
    return len(tokenizer(SYSTEM_PROMPT + AFTER_SYSTEM)["input_ids"])


def split_chats(chats: Any) -> list[Chat]:
    """One dialogue or several, as a list of dialogues.

    Args:
        chats: a list of rounds (element [0][0] is a message), or a list of such lists.

    Raises:
        InputError: neither; a chat that is not a list.
    """
    if not isinstance(chats, list):
        raise InputError(f"chats must be a list, not {type(chats).__name__}.")
    if chats and isinstance(chats[0], list) and chats[0] and isinstance(chats[0][0], dict):
        return [chats]
    for chat in chats:
        if not isinstance(chat, list):
            raise InputError(f"chats must hold rounds or dialogues, each of them a list, not {type(chat).__name__}.")
    return chats
