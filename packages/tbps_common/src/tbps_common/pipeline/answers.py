"""What a chat model's answer really is: without its reasoning, the marks of its template, and what models put around it."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tbps_common.pipeline.journal import refuse_constant

# Tags between which models reason aloud; the last two groups are Mistral's and gpt-oss's.
_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis)"
_OPENED = re.compile(rf"<\s*{_NAMES}\s*>|\[THINK\]", re.IGNORECASE)
_CLOSED = re.compile(rf"<\s*/\s*{_NAMES}\s*>|\[/THINK\]", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_CHANNELS_WITHOUT_MARKS = re.compile(r"\A\s*analysis(?=\W|[A-Z]).*?assistant\s*final", re.DOTALL)

# Everything from the first mark on belongs to the next turn.
_BEGINS = re.compile(
    r"\A(?:\s*(?:<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<\|start\|>\s*assistant"
    r"|<start_of_turn>\s*model|<\|assistant\|>|<\|begin_of_text\|>|<s>|<bos>))+"
)
_ENDS = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end|end_of_text|endoftext|return|start_header_id|start|user|call)\|>"
    r"|</s>|<eos>|<end_of_turn>|<\uff5cend\u2581of\u2581sentence\uff5c>"
)

_FENCE = re.compile(r"```[\w+-]*[ \t]*\n?(.*?)\n?[ \t]*```", re.DOTALL)
_COURTESY = re.compile(
    r"\A(?:(?:sure|certainly|of course|absolutely|ok|okay|alright)(?: thing)?[!,.]+\s*)?"
    r"(?:here(?:'s|\u2019s| is| are)\b[^:.\n]{0,60}\b(?:answer|array|caption|description|json|list|object|output|question|"
    r"result|rewrite|sentence|text|verdict|version)s?\b[^:.\n]{0,60}:\s*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\A(?:(?:final|rewritten|revised|new|my)\s+)?"
    r"(?:answer|sentence|caption|description|question|output|response|result|assistant|user|witness)\s*:\s*",
    re.IGNORECASE,
)
_FAREWELL = re.compile(
    r"\n\s*(?:let me know|i hope|feel free|is there anything|please let me)\b[^\n]*\s*\Z", re.IGNORECASE
)
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}

_JSON_START = re.compile(r'\{\s*["}]|\[\s*[\[\]{"\-\dtfn]')


class Rejected(Exception):
    """The answer cannot be used, for the reason given; the same is asked again.

    Args:
        reason: for the side file.
        remark: what to tell the model with the next try; without it the same messages are sent again.
    """

    def __init__(self, reason: str, remark: str | None = None) -> None:
        super().__init__(reason)
        self.remark = remark


def final_answer(text: str) -> str:
    """What a model answered, without reasoning, template marks, courtesies, code fences, emphasis and outer quotes.

    Raises:
        Rejected: it reasons and never answers.
    """
    text = _without_marks(_without_reasoning(text)).strip()
    text = _COURTESY.sub("", text, count=1) or text
    fences = _FENCE.findall(text)
    if len(fences) == 1:
        text = fences[0]
    text = _FAREWELL.sub("", text)
    text = _EMPHASIS.sub(r"\2", text).strip()
    text = _LABEL.sub("", text, count=1)
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip()
    if not text:
        raise _unfinished()
    return text


def json_values(text: str) -> Iterator[Any]:
    """The JSON arrays and objects in a text, in their order; what stands inside another one is not listed by itself."""
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    place = 0
    while found := _JSON_START.search(text, place):
        try:
            value, place = decoder.raw_decode(text, found.start())
        except RecursionError:  # no answer is nested that deeply
            return
        except ValueError:
            place = found.start() + 1
        else:
            yield value


def _unfinished() -> Rejected:
    return Rejected("the answer has no final part", remark="That had no final answer. Give the final answer alone.")


def _without_reasoning(text: str) -> str:
    channels = list(_CHANNEL.finditer(text))
    if channels:
        if channels[-1][1] != "final":
            raise _unfinished()
        return text[channels[-1].end() :]
    text = _CHANNELS_WITHOUT_MARKS.sub("", text)
    closed = list(_CLOSED.finditer(text))
    if closed:
        text = text[closed[-1].end() :]
    if _OPENED.search(text):
        raise _unfinished()
    return text


def _without_marks(text: str) -> str:
    text = _BEGINS.sub("", text)
    end = _ENDS.search(text)
    return text[: end.start()] if end else text
