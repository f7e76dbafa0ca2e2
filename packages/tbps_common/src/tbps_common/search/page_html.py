"""The parts of the page of `tbps-page` that are HTML: hits, a hit in its frame, the conversation, messages.

Pictures travel inside the page, as data URIs, never as files that have an address: there is no path that a visitor could ask
for.
"""

import base64
import html
import io
import os
from collections.abc import Sequence
from datetime import datetime

from PIL import Image, ImageDraw, ImageOps

from tbps_common.errors import DatasetError
from tbps_common.search.gallery import Hit
from tbps_common.search.retriever import Round
from tbps_common.search.search import frame_of, picture_of

Answers = Sequence[tuple[str, list[Hit] | str]]
"""Of each model, its hits, or why it has none."""


def shown_picture(hit: Hit, *, whole: bool = False) -> Image.Image | None:
    """The person of a hit, or the whole frame with the person's box; None if the file cannot be read any more.

    A file that has become a link since it was indexed is not followed.
    """
    try:
        if os.path.islink(hit.path):
            return None
        if not whole or hit.box is None:
            return picture_of(hit)
        frame = frame_of(hit)
    except DatasetError:
        return None
    width = max(2, round(max(frame.size) / 250))
    draw = ImageDraw.Draw(frame)
    left, top, right, bottom = hit.box
    draw.rectangle((left - width, top - width, right + width, bottom + width), outline=(255, 255, 255), width=width)
    draw.rectangle((left, top, right, bottom), outline=(222, 96, 44), width=width)
    return frame


def _uri(picture: Image.Image, room: tuple[int, int]) -> str:
    file = io.BytesIO()
    ImageOps.contain(picture, room, Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def escaped(value: object) -> str:
    """Text as HTML has it; names of files need not be Unicode."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _value(value: object) -> str:
    return escaped(value.isoformat(" ").removesuffix(":00") if isinstance(value, datetime) else value)


def message_html(text: str) -> str:
    """A message instead of hits."""
    return f'<p class="message" role="status">{escaped(text)}</p>'


def answers_html(answers: Answers) -> str:
    """The hits of all models, side by side."""
    columns = []
    for number, (name, hits) in enumerate(answers):
        if isinstance(hits, str):
            body = message_html(hits)
        else:
            body = f'<ol class="hits">{"".join(_hit_html(number, rank, hit) for rank, hit in enumerate(hits))}</ol>'
        columns.append(f'<section class="answer"><h3>{escaped(short_name(name))}</h3>{body}</section>')
    return f'<div class="answers n{min(len(columns), 3)}">{"".join(columns)}</div>'


def short_name(name: str) -> str:
    """A model as the page calls it: its kind, and the last part of its place."""
    kind, _, place = name.partition(":")
    return f"{kind} · {os.path.basename(os.path.normpath(place)) if os.path.exists(place) else place}"


def _hit_html(number: int, rank: int, hit: Hit) -> str:
    picture = shown_picture(hit)
    shown = (
        f'<img src="{_uri(picture, (240, 480))}" alt="hit {rank + 1}">'
        if picture is not None
        else '<span class="gone">the picture is gone</span>'
    )
    known = [value for value in list(hit.data.values())[:3] if value is not None]
    known += [] if hit.frame is None else [f"frame {hit.frame}"]
    facts = "".join(f"<span>{_value(value)}</span>" for value in known)
    return (
        f'<li><button type="button" class="hit" data-hit="{number}:{rank}">{shown}'
        f'<span class="line"><b>{rank + 1}</b><i>{hit.score:.3f}</i></span><span class="facts">{facts}</span></button></li>'
    )


def detail_html(hit: Hit) -> str:
    """A hit, large, in its frame, with all that is known of it."""
    picture = shown_picture(hit, whole=True)
    shown = (
        f'<img src="{_uri(picture, (960, 420))}" alt="the hit in its frame">'
        if picture is not None
        else message_html("The picture file is gone or cannot be read: run tbps-index again.")
    )
    facts: dict[str, object] = {"score": f"{hit.score:.4f}", **hit.data}
    if hit.frame is not None:
        facts["frame"] = hit.frame
    if hit.box is not None:
        facts["box"] = ", ".join(map(str, hit.box))
    facts["file"] = hit.key
    rows = "".join(
        f"<dt>{escaped(name)}</dt><dd>{_value(value)}</dd>" for name, value in facts.items() if value is not None
    )
    return f'<div class="detail">{shown}<dl>{rows}</dl></div>'


def chat_html(rounds: Sequence[Round], asked: str) -> str:
    """The conversation so far, and the question that waits for an answer."""
    said = [(message["from"], message["value"]) for one in rounds for message in one]
    said += [("gpt", asked)] if asked else []
    lines = "".join(f'<p class="{"asks" if who == "gpt" else "tells"}">{escaped(text)}</p>' for who, text in said)
    return f'<div class="chat" role="log">{lines}</div>'


def preview_html(picture: Image.Image) -> str:
    """The visitor's picture, above the field that it was dropped on."""
    return f'<img class="preview" src="{_uri(picture, (200, 220))}" alt="your picture">'
