"""The two roles of a simulated dialogue: who asks sees only the dialogue, who answers sees only the captions."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tbps_common.pipeline.answers import Rejected

Round = list[dict[str, str]]
Message = dict[str, Any]

Turn = tuple[list[Message], Callable[[str], str]]
"""Messages to the model, and what makes a line of its answer; that raises `Rejected`."""

UNKNOWN = "I do not remember."
SAMPLING = {"max_tokens": 120}
_LONGEST_QUESTION, _LONGEST_ANSWER = 200, 400

QUESTIONER = """\
You interview a witness to find one person in surveillance pictures. You see the conversation so far. Ask exactly one \
short question about one attribute of the person's appearance that has not been mentioned yet: hair, upper garment, \
lower garment, shoes, bag, accessories, a colour, what the person is doing, or the surroundings. Never repeat a question, \
and do not ask about the face, the name or feelings. Reply with the question alone."""

ANSWERER = """\
You are a witness who saw one person. All you remember is in these notes:

{notes}

Answer the question in one short sentence, only with what the notes say about what is asked. If the notes do not say it, \
answer exactly: {unknown}"""

OPENING = """\
You are a witness who saw one person. All you remember is in these notes:

{notes}

You are asked: {question} Give a first short answer: one sentence with the overall impression and at most two attributes. \
Say nothing that is not in the notes. Reply with the sentence alone."""


def ask_question(rounds: Sequence[Round]) -> Turn:
    """For the next question, one that has not been asked."""
    asked = {_key(message["value"]) for turn in rounds for message in turn if message["from"] == "gpt"}

    def accept(text: str) -> str:
        question = one_line(text, _LONGEST_QUESTION)
        if _key(question) in asked:
            raise _misfit("this question was asked already")
        return question

    return [{"role": "system", "content": QUESTIONER}, *_as_seen_by_asker(rounds)], accept


def answer_question(captions: Sequence[str], question: str) -> Turn:
    """For the witness's answer."""
    notes = ANSWERER.format(notes=_notes(captions), unknown=UNKNOWN)
    messages = [{"role": "system", "content": notes}, {"role": "user", "content": question}]
    return messages, lambda text: one_line(text, _LONGEST_ANSWER)


def open_dialogue(captions: Sequence[str], question: str) -> Turn:
    """For the first answer, to a general request."""
    content = OPENING.format(notes=_notes(captions), question=question)
    return [{"role": "user", "content": content}], lambda text: one_line(text, _LONGEST_ANSWER)


def one_line(text: str, longest: int) -> str:
    """The text on one line.

    Raises:
        Rejected: it is too long.
    """
    line = re.sub(r"\s+", " ", text).strip()
    if len(line) > longest:
        raise _misfit(f"it has {len(line)} characters, {longest} are the most")
    return line


def _misfit(reason: str) -> Rejected:
    """A model that takes the most probable words answers the same again, unless it is told what was wrong."""
    return Rejected(reason, remark=f"That did not fit: {reason}. Try again.")


def _as_seen_by_asker(rounds: Sequence[Round]) -> list[Message]:
    """The asker's own questions are the assistant's messages; it is asked to go on after the last answer."""
    roles = {"gpt": "assistant", "user": "user"}
    return [{"role": roles[message["from"]], "content": message["value"]} for turn in rounds for message in turn]


def _notes(captions: Sequence[str]) -> str:
    return "\n".join(f"- {caption.strip()}" for caption in captions)


def _key(question: str) -> str:
    return re.sub(r"[^\w]+", " ", question.lower()).strip()
