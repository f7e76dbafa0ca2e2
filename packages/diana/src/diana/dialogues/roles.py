"""The two roles of a simulated dialogue: who asks sees only the dialogue, who answers sees only the captions."""

import re
from collections.abc import Sequence

from diana.dialogues.client import ChatClient, Deadline, Message

Round = list[dict[str, str]]

UNKNOWN = "I do not remember."
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


def ask_question(client: ChatClient, rounds: Sequence[Round], deadline: Deadline | None = None) -> str:
    """The next question, one that has not been asked.

    Raises:
        ItemFailed: none came in time.
        InputError: the server refuses.
    """
    asked = {_key(message["value"]) for turn in rounds for message in turn if message["from"] == "gpt"}

    def accept(text: str) -> str:
        question = one_line(text, _LONGEST_QUESTION)
        if _key(question) in asked:
            raise ValueError("this question was asked already")
        return question

    return client.ask(
        [{"role": "system", "content": QUESTIONER}, *_as_seen_by_asker(rounds)], accept, deadline=deadline
    )


def answer_question(client: ChatClient, captions: Sequence[str], question: str, deadline: Deadline) -> str:
    """The witness's answer; errors as `ask_question`."""
    notes = ANSWERER.format(notes=_notes(captions), unknown=UNKNOWN)
    messages = [{"role": "system", "content": notes}, {"role": "user", "content": question}]
    return client.ask(messages, lambda text: one_line(text, _LONGEST_ANSWER), deadline=deadline)


def open_dialogue(client: ChatClient, captions: Sequence[str], question: str, deadline: Deadline) -> str:
    """The first answer, to a general request; errors as `ask_question`."""
    content = OPENING.format(notes=_notes(captions), question=question)
    return client.ask(
        [{"role": "user", "content": content}], lambda text: one_line(text, _LONGEST_ANSWER), deadline=deadline
    )


def one_line(text: str, longest: int) -> str:
    """The text on one line, without quotation marks around it and the name of the speaker in front.

    Raises:
        ValueError: nothing is left, it is too long, or it cannot be written as UTF-8.
    """
    line = re.sub(r"\s+", " ", text).strip()
    line = re.sub(r"^(?:assistant|user|question|answer|witness)\s*:\s*", "", line, flags=re.IGNORECASE)
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
        line = line[1:-1].strip()
    if not line:
        raise ValueError("it is empty")
    if len(line) > longest:
        raise ValueError(f"it has {len(line)} characters, {longest} are the most")
    line.encode("utf-8")
    return line


def _as_seen_by_asker(rounds: Sequence[Round]) -> list[Message]:
    """The asker's own questions are the assistant's messages; it is told to go on after the last answer."""
    roles = {"gpt": "assistant", "user": "user"}
    return [{"role": roles[message["from"]], "content": message["value"]} for turn in rounds for message in turn]


def _notes(captions: Sequence[str]) -> str:
    return "\n".join(f"- {caption.strip()}" for caption in captions)


def _key(question: str) -> str:
    return re.sub(r"[^\w]+", " ", question.lower()).strip()
