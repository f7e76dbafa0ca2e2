"""Columns that a user adds to the pictures of a gallery: camera, time, place, ... from a CSV file with a column `path`."""

import csv
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from tbps_common.errors import InputError
from tbps_common.search.gallery import OWN_COLUMNS, Gallery, explained

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_MERGED_ROWS = 50_000


def _time(text: str) -> datetime:
    """ISO 8601; with a time zone it is converted to UTC."""
    if "-" not in text:
        raise ValueError(text)
    value = datetime.fromisoformat(text)
    return value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?(0|[1-9]\d{0,17})", text):  # 007 is a name, not a number
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float:
    if re.fullmatch(r"[+-]?0\d+", text) or not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


_KINDS: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "integer": (pa.int64(), _integer),
    "number": (pa.float64(), _number),
    "time": (pa.timestamp("us"), _time),
    "string": (pa.string(), str),
}


@dataclass(frozen=True)
class Metadata:
    """The rows of a CSV file.

    Attributes:
        file: it.
        paths: of the pictures, as the file has them.
        types: of the columns.
        columns: their values, None where a cell is empty.
    """

    file: str
    paths: list[str]
    types: dict[str, Any]
    columns: dict[str, list[Any]]

    def places(self, gallery: Gallery) -> dict[str, int]:
        """Row of the file for each stored path of the gallery; relative paths are those of its root, or else of here."""
        found: dict[str, int] = {}
        for place, path in enumerate(self.paths):
            found.setdefault(gallery.stored_path(os.path.abspath(path)), place)
        for place, path in enumerate(self.paths):
            found[gallery.stored_path(os.path.join(gallery.root, path))] = place
        return found

    def prepare(self, gallery: Gallery) -> None:
        """Make sure that the gallery has the columns.

        Raises:
            InputError: a name is taken, or a column of the gallery has another type.
        """
        there = {name.lower(): name for name in gallery.table.schema.names}
        missing = []
        for name, kind in self.types.items():
            if name.lower() not in there:
                missing.append(pa.field(name, kind))
            elif name not in gallery.columns:
                raise InputError(
                    f"{self.file}: the column {name!r} is the gallery's own or differs from one in case: rename it"
                )
            elif gallery.columns[name] not in (kind, pa.string()):
                raise InputError(
                    f"{self.file}: the column {name!r} holds {kind}, but {gallery.path} holds {gallery.columns[name]} under "
                    "this name: correct the file, or use another name"
                )
        if missing:
            with explained(gallery.path):
                gallery.table.add_columns(pa.schema(missing))

    def values(self, gallery: Gallery, paths: Sequence[str], places: dict[str, int]) -> dict[str, list[Any]]:
        """Values of some stored paths, None where the file says nothing."""
        found: dict[str, list[Any]] = {}
        for name, column in self.columns.items():
            as_text = gallery.columns[name] == pa.string() != self.types[name]
            values = [None if (place := places.get(path)) is None else column[place] for path in paths]
            found[name] = [None if value is None else str(value) for value in values] if as_text else values
        return found

    def apply(self, gallery: Gallery) -> None:
        """Give the pictures of a gallery the values that the file has for them, where they have others."""
        self.prepare(gallery)
        places = self.places(gallery)
        names = list(self.columns)
        with explained(gallery.path):
            gallery.table.checkout_latest()
            stored = gallery.table.search().select(["path", *names]).to_arrow()
        paths = stored["path"].to_pylist()
        wanted = self.values(gallery, paths, places)
        changed: dict[str, int] = {}
        for name in names:
            now = stored[name].to_pylist()
            changed |= {
                path: row
                for row, (path, old, new) in enumerate(zip(paths, now, wanted[name]))
                if path in places and old != new
            }
        rows = list(changed.values())
        for start in range(0, len(rows), _MERGED_ROWS):
            part = rows[start : start + _MERGED_ROWS]
            table = {"path": [paths[row] for row in part]}
            table |= {name: pa.array([wanted[name][row] for row in part], gallery.columns[name]) for name in names}
            with explained(gallery.path):
                gallery.table.merge_insert("path").when_matched_update_all().execute(pa.table(table))


def read_metadata(file: str) -> Metadata:
    """Read a CSV file with a header; one of its columns is `path`.

    The type of a column follows from its values: whole numbers, numbers, times (ISO 8601) or else text. A column whose
    values are mostly, but not all, of one kind is refused, unless its header names the kind, as in `camera:string`.

    Raises:
        InputError: the file is no such table.
    """
    try:
        with open(Path(file), encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--metadata {file} is not a readable CSV file ({error})") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if header.count("path") != 1 or len(header) < 2:
        raise InputError(f"--metadata {file}: the first line must name the columns, one of which is path")
    lines = [(number, row) for number, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    for number, row in lines:
        if len(row) != len(header):
            raise InputError(f"--metadata {file}, line {number}: {len(row)} cells where the header has {len(header)}")
    where = header.index("path")
    types, columns = {}, {}
    for place, title in enumerate(header):
        name, _, declared = (part.strip() for part in title.partition(":"))
        if place == where:
            continue
        if not _NAME.fullmatch(name) or name in types or name.lower() in OWN_COLUMNS:
            raise InputError(
                f"--metadata {file}: a column cannot be called {name!r}: use letters, digits and _, and none of "
                f"{', '.join(OWN_COLUMNS)}"
            )
        types[name], columns[name] = _column(file, name, declared, [(line, row[place].strip()) for line, row in lines])
    return Metadata(file, [row[where].strip() for _, row in lines], types, columns)


def _column(file: str, name: str, declared: str, cells: list[tuple[int, str]]) -> tuple[Any, list[Any]]:
    filled = [(line, text) for line, text in cells if text]
    if declared and declared not in _KINDS:
        raise InputError(f"--metadata {file}: {declared!r} of the column {name!r} is not one of {', '.join(_KINDS)}")
    for kind in [declared] if declared else _KINDS:
        arrow, parse = _KINDS[kind]
        bad = next(((line, text) for line, text in filled if not _is(parse, text)), None)
        if bad is None:
            return arrow, [parse(text) if text else None for _, text in cells]
        if declared or (kind != "integer" and 2 * sum(_is(parse, text) for _, text in filled) > len(filled)):
            raise InputError(
                f"--metadata {file}, line {bad[0]}: {bad[1]!r} is not a {kind} as the other values of {name!r} are: correct "
                f"it, or call the column {name}:string in the first line"
            )
    raise AssertionError("every cell is a string")


def _is(parse: Callable[[str], Any], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
