"""What the page of `tbps-page` asks and answers: filters, uploads, and the hits of every model. No Gradio in here."""

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.search.gallery import Gallery, Hit, check_filter, explained, open_gallery, quoted
from tbps_common.search.retriever import KINDS, Query, Retriever
from tbps_common.search.search import search

MOST_WORDS = 2000  # characters of a question
_CHOICES = 50  # a column with at most so many values becomes a list to choose from


@dataclass(frozen=True)
class Filters:
    """Columns that become fields of the page: those with few values, with their values, and times."""

    choices: dict[str, list[str]]
    times: list[str]


def find_filters(galleries: Sequence[Gallery]) -> Filters:
    """Which columns of the metadata become fields."""
    choices: dict[str, set[Any]] = {}
    times: list[str] = []
    for gallery in galleries:
        names = [name for name, kind in gallery.columns.items() if not pa.types.is_floating(kind)]
        with explained(gallery.path):
            table = gallery.table.search().where("problem IS NULL").select(names or ["key"]).to_arrow()
        for name in names:
            if pa.types.is_timestamp(gallery.columns[name]):
                times += [name] if name not in times else []
            else:
                choices.setdefault(name, set()).update(table[name].unique().drop_null().to_pylist())
    few = {name: sorted(map(str, values)) for name, values in choices.items() if 0 < len(values) <= _CHOICES}
    return Filters(few, times)


def condition(
    gallery: Gallery, chosen: Mapping[str, Sequence[str]], between: Mapping[str, tuple[str, str]], where: str
) -> str | None:
    """The fields of the page as one condition on a gallery.

    Args:
        gallery: whose columns they are.
        chosen: values by column.
        between: earliest and latest time by column; empty for no limit.
        where: free SQL.

    Raises:
        InputError: a time is none, or `where` is no condition.
    """
    parts = []
    for name, values in chosen.items():
        if values:
            parts.append(f"CAST({name} AS string) IN ({', '.join(quoted(str(value)) for value in values)})")
    for name, limits in between.items():
        for mark, text in zip((">=", "<="), limits):
            if text.strip():
                try:
                    moment = datetime.fromisoformat(text.strip()).replace(tzinfo=None)
                except ValueError as error:
                    raise InputError(f"{text!r} is not a time: write it like 2026-05-01 08:30") from error
                parts.append(f"{name} {mark} timestamp '{moment.isoformat(sep=' ')}'")
    if where.strip():
        try:
            parts.append(str(check_filter(gallery, where)))
        except InputError as error:
            raise InputError(str(error).replace("--where", "The condition")) from error
    return " AND ".join(parts) or None


def read_upload(uri: object, most: int, folder: Path) -> Image.Image:
    """The picture that a browser sent as a data URI.

    Raises:
        InputError: it is too large, or not a picture.
    """
    encoded = uri.partition(";base64,")[2] if isinstance(uri, str) else ""
    if len(encoded) * 3 // 4 > most + 2:
        raise InputError(too_large(most))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            file.write(base64.b64decode(encoded, validate=True))
        except ValueError as error:
            raise InputError("This file did not arrive whole: choose it again.") from error
        file.flush()
        try:
            return read_image(file.name, as_shown=True)
        except DatasetError as error:
            reason = str(error).removeprefix("The image ").replace(file.name, "").strip()
            raise InputError(f"This file cannot be used as a picture: it {reason}") from error


def too_large(most: int) -> str:
    """What is said of an upload of more than `most` bytes."""
    return f"This file is larger than {most >> 20} MB: choose a smaller picture."


def answer(
    gallery: str,
    models: Mapping[str, Retriever],
    chosen: Sequence[str],
    query: Query,
    topk: int,
    conditions: Callable[[Gallery], str | None],
) -> list[tuple[str, list[Hit] | str]]:
    """Hits of each chosen model that takes the question, or of all that take it where no chosen one does.

    Raises:
        InputError: no model takes the question, or nothing is asked.
    """
    if query.kind == "text" and not query.text.strip():
        raise InputError("Describe the person to look for.")
    if len(query.text) > MOST_WORDS:
        raise InputError(f"That is longer than {MOST_WORDS} characters: say it in fewer words.")
    able = [name for name, model in models.items() if query.kind in model.queries]
    if not able:
        takes = sorted({KINDS[kind] for model in models.values() for kind in model.queries})
        hint = {
            "image": " Say what is different in the pictures to find.",
            "image+text": " Start the page with one that does, such as --model fafa:RUN.",
            "dialogue": " Start the page with one that does, such as --model diana:FOLDER.",
        }.get(query.kind, "")
        raise InputError(
            f"No model of this page can search with {KINDS[query.kind]}, only with {', '.join(takes)}.{hint}"
        )
    found: list[tuple[str, list[Hit] | str]] = []
    for name in [name for name in chosen if name in able] or able:
        try:
            opened = open_gallery(gallery, models[name])
            hits = search(opened, models[name], [query], topk=topk, where=conditions(opened))[0]
        except (InputError, OSError) as error:
            found.append((name, str(error)))
            continue
        if hits:
            found.append((name, hits))
        elif len(opened):
            found.append((name, "No picture fits the filters."))
        else:
            found.append(
                (name, f"Nothing is indexed: fill the gallery with tbps-index --model {name} --images FOLDER.")
            )
    return found
