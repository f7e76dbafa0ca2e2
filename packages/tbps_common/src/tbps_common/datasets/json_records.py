"""Annotation files: strict JSON lists of objects, read record by record, each key checked where it is used.

A stored file name is joined to a `Folder` that it must not leave.
"""

import gc
import json
import logging
import math
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, BinaryIO, NoReturn

import orjson

from tbps_common.errors import DatasetError

logger = logging.getLogger("tbps_common.datasets")

Files = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Identity = int | str

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number", bool: "a boolean"}
_PART = 1 << 23  # bytes of a file that are parsed at a time
_INT64 = range(-(2**63), 2**63)
_ABSENT = object()
_SURROGATE = re.compile("[\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")
# A key ends in `":`. In a string, a quotation mark comes after a back-slash.
_NOT_AFTER_A_KEY = re.compile(rb':(?<![^\\]":)')
_skip_space: Callable[[str, int], Any] = re.compile(r"[ \t\n\r]*").match


class _NotStrictJSON(ValueError):
    """Accepted by Python's parser, but not by the JSON standard or not without losing data."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotStrictJSON(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _NotStrictJSON(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one strict JSON file (UTF-8, with or without a byte order mark).

    Raises:
        DatasetError: the file is missing, is not UTF-8 or not JSON (NaN and doubled keys included); names the file,
            line and column.
    """
    text = _read_text(path)
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, text, error) from error


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive objects of an annotation file; `first` is the number of the first one.

    What `Record` reads of one object, a block reads of all, with the same checks and messages.
    """

    fields: list[dict[str, Any]]
    file: str
    first: int

    def records(self) -> Iterator["Record"]:
        return (Record(fields, self.file, number) for number, fields in enumerate(self.fields, self.first))

    def texts(self, key: str) -> Sequence[str]:
        values, types = self._column(key)
        if types == {str} and all(map(str.isascii, values)):
            return values
        return [record.text(key) for record in self.records()]

    def optional_texts(self, key: str) -> Sequence[str | None]:
        values, types = self._column(key)
        if types == {type(None)}:
            return values
        return [record.optional_text(key) for record in self.records()] if types != {str} else self.texts(key)

    def identities(self, key: str) -> Sequence[Identity]:
        values, types = self._column(key)
        return values if types <= {int, str} else [record.identity(key) for record in self.records()]

    def integers(self, key: str) -> Sequence[int]:
        values, types = self._column(key)
        if types == {int} and min(values) in _INT64 and max(values) in _INT64:
            return values
        return [record.integer(key) for record in self.records()]

    def paths(self, key: str, folder: "Folder") -> list[str]:
        names, types = self._column(key)
        joined = folder.join_plain(names) if types == {str} else None
        return [record.path(key, folder) for record in self.records()] if joined is None else joined

    def empty(self, key: str) -> int:
        """How many of the strings of a key, or of its lists of strings, are empty; the key must have been read before."""
        values: Iterable[Any] = self._column(key)[0]
        if values and type(values[0]) is list:
            values = list(chain.from_iterable(values))
        return len(values) - sum(map(bool, map(str.strip, values)))

    def _column(self, key: str) -> tuple[list[Any], set[type]]:
        """The value of every object, and the types that occur; an absent value counts as None."""
        try:
            values = list(map(itemgetter(key), self.fields))
        except KeyError:
            values = [fields.get(key) for fields in self.fields]
        return values, set(map(type, values))


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause cyclic garbage collection: it would walk all that was read so far again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def iter_records(path: str | os.PathLike[str], texts: str | None = None) -> Iterator["Record"]:
    """Yield the objects of a JSON list one by one; arguments and errors as for `iter_blocks`."""
    for block in iter_blocks(path, texts):
        yield from block.records()


def iter_blocks(path: str | os.PathLike[str], texts: str | None = None) -> Iterator[Block]:
    """Yield the objects of a JSON list, some thousand at a time, so that a million of them are never held as a whole.

    Args:
        path: of the file.
        texts: key of a string, or of a list of strings; how many of them are empty is logged after the last record.

    Raises:
        DatasetError: as `read_json`, or the file is not a list of objects; names the file and the record.
    """
    file, number, place, empty = os.fspath(path), 0, 0, 0
    with without_collection():
        with _open(path) as stream:
            for records, after in _read_quickly(stream):
                yield (block := Block(records, file, number))
                number, place = number + len(records), after
                empty += block.empty(texts) if texts else 0
        if place >= 0:
            for record in _read_carefully(path, place, number):
                yield (block := Block([record], file, number))
                number += 1
                empty += block.empty(texts) if texts else 0
        if empty:
            logger.warning("%s: %d empty captions", file, empty)


def _read_quickly(stream: BinaryIO) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield objects of a JSON list, some MB of the file at a time, each time with the place in the file after them.

    The place after the last is -1. Ends early at what is not plainly right: `_read_carefully` goes on from that place.
    A part of the file is cut off behind a `}` before a comma, wherever that stands. If it stands within a string or an object,
    the part is not valid JSON; so what can be read has been cut between two objects.
    """
    data = stream.read(_PART)
    rest = data.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\n\r")
    place = len(data) - len(rest) + 1
    if not rest.startswith(b"["):
        return
    rest, beginning = rest[1:], True
    while True:
        more = stream.read(_PART)
        data = rest + more
        end = data.rfind(b"},") + 1 if more else len(data)
        records = _objects(b"[" + (data[:end] + b"]" if more else data)) if end else None
        if records is None or (not records and not beginning):  # a comma before the end of the list
            return
        place += end + 1
        yield records, place if more else -1
        if not more:
            return
        rest, beginning = data[end + 1 :], False


def _objects(text: bytes) -> list[dict[str, Any]] | None:
    """The objects of a JSON list; `None` if it is not strict JSON, or not a list of objects."""
    try:
        records = orjson.loads(text)
        if set(map(type, records)) - {dict}:
            return None
        # Of a key that is given twice, this parser keeps the last value.
        return records if _count_keys(text) == sum(map(len, records)) else _DECODER.decode(str(text, "utf-8"))
    except (ValueError, RecursionError):
        return None


def _count_keys(text: bytes) -> int:
    """Keys in all objects of a JSON text, nested ones too; -1 if it takes a parser to tell."""
    colons = text.count(b":")
    for match in _NOT_AFTER_A_KEY.finditer(text):
        place = match.start()
        if text[place - 1] in b" \t\n\r" or text[place - 3 : place] == b'\\\\"':
            return -1  # either could also come after a key
        colons -= 1
    return colons


def _read_carefully(path: str | os.PathLike[str], place: int, number: int) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list one by one.

    Args:
        path: of the file.
        place: byte to begin with; 0 is the beginning of the file, and what comes before any other is right.
        number: of the objects before it.
    """
    text = _read_text(path)
    file, first = os.fspath(path), place == 0
    try:
        if first:
            position = _skip_space(text, 0).end()
            if text[position] != "[":
                value = _DECODER.decode(text)
                raise DatasetError(f"{file} holds {_kind(value)} at the top; a list of objects is needed.")
        else:
            with _open(path) as stream:
                position = len(str(stream.read(place - 1), "utf-8-sig"))
        position = _skip_space(text, position + 1).end()
        more = not first or text[position] != "]"
        while more:
            fields, position = _DECODER.raw_decode(text, position)
            if type(fields) is not dict:
                raise DatasetError(f"{file}: record {number} (counted from 0) is {_kind(fields)}, not an object.")
            yield fields
            number += 1
            position = _skip_space(text, position).end()
            more = text[position] == ","
            if more:
                position = _skip_space(text, position + 1).end()
            elif text[position] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _skip_space(text, position + 1).end()
        if position != len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except IndexError as error:
        cut = json.JSONDecodeError("Unexpected end of file", text, len(text))
        raise _bad_json(path, text, cut, number) from error
    except DatasetError:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, text, error, number) from error


def as_list(files: Files) -> list[str]:
    """One path or several, as a list of strings.

    Raises:
        DatasetError: no file is given.
    """
    paths = [os.fspath(files)] if isinstance(files, (str, os.PathLike)) else [os.fspath(file) for file in files]
    if not paths:
        raise DatasetError("No annotation file is given; name at least one JSON file.")
    return paths


class Folder:
    """Joins stored names to a folder, by rules that look at the name only: no file system call per image.

    Back-slashes count as separators, so that a list made on Windows works everywhere and cannot smuggle in a climb.
    """

    __slots__ = ("path", "_prefix")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._prefix = os.path.join(self.path, "")

    def __str__(self) -> str:
        return self.path or "the working folder"

    def problem(self, name: str) -> str | None:
        """Why `name` is refused; `None` if it stays inside the folder."""
        if name.isascii() and name[:1].isalnum() and ".." not in name and "\\" not in name and ":" not in name[:2]:
            if "\0" not in name and name[-1] != "/":
                return None  # the common case, decided without splitting the name
        if "\0" in name:
            return "holds a NUL character"
        if _SURROGATE.search(name):
            return "holds half of a surrogate pair"
        plain = name.replace("\\", "/")
        if plain.startswith("/") or _DRIVE.match(plain):
            return "is an absolute path"
        normal = posixpath.normpath(plain)
        if normal == "." or plain.endswith("/"):
            return "names a folder, not a file"
        if normal == ".." or normal.startswith("../"):
            return "climbs out of the folder"
        return None

    def join_plain(self, names: Sequence[str]) -> list[str] | None:
        """`folder/name` of every name; `None` if one of them is not plain enough to see at once that it stays inside."""
        text = "\n".join(names) + "\n"
        if not text.isascii() or any(odd in text for odd in ("..", "\\", ":", "\0", "/\n")):
            return None
        if text.count("\n") != len(names) or not "".join({name[:1] or "?" for name in names} or "a").isalnum():
            return None
        return [self._prefix + name for name in names]

    def join(self, name: str) -> str:
        """`folder/name`; a name that goes up and down inside the folder is normalised. Ask `problem` first."""
        if "\\" in name:
            name = name.replace("\\", "/")
        if ".." in name:
            name = posixpath.normpath(name)
        return self._prefix + name


class Numbers(dict[Any, int]):
    """Value -> its number; values are numbered from 0 in order of first appearance."""

    def __missing__(self, value: Any) -> int:
        self[value] = number = len(self)
        return number


class Record:
    """One object of an annotation file; every read checks the type and names file, record and key if it is wrong."""

    __slots__ = ("fields", "file", "number")

    def __init__(self, fields: dict[str, Any], file: str, number: int) -> None:
        self.fields = fields
        self.file = file
        self.number = number

    def text(self, key: str) -> str:
        """A string without lone surrogates (they can be neither tokenised nor written)."""
        value = self.fields.get(key, _ABSENT)
        if type(value) is not str:
            self._wrong(key, value, "a string")
        if not value.isascii():
            self.check_characters(key, value)
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.fields.get(key) is None else self.text(key)

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self.sequence(key, "a list of strings")
        for item in value:
            if type(item) is not str:
                self._wrong(key, value, "a list of strings", f"a list with {_kind(item)}")
            if not item.isascii():
                self.check_characters(key, item)
        return value

    def sequence(self, key: str, wanted: str = "a list") -> list[Any]:
        value = self.fields.get(key, _ABSENT)
        if type(value) is not list:
            self._wrong(key, value, wanted)
        return value

    def numbers(self, key: str) -> list[int | float]:
        """A list of finite numbers."""
        value = self.sequence(key, "a list of numbers")
        if not _all_finite(value):
            self._wrong(key, value, "a list of finite numbers", "another list")
        return value

    def boxes(self, key: str) -> list[list[float]]:
        """A list of four-number lists."""
        value = self.sequence(key, "a list of boxes")
        if set(map(type, value)) == {list} and set(map(len, value)) == {4}:
            if _all_finite(list(chain.from_iterable(value))):
                return value
        for box in value:
            if type(box) is not list or len(box) != 4 or not _all_finite(box):
                self._wrong(
                    key, value, "a list of [centre x, centre y, width, height] in finite numbers", "another list"
                )
        return value

    def integer(self, key: str) -> int:
        """An id that is returned as it is stored: an integer, or its digits as a string."""
        value = self.fields.get(key, _ABSENT)
        if type(value) is str and len(value) < 20 and value.isascii() and value.removeprefix("-").isdigit():
            value = int(value)
        if type(value) is not int:
            self._wrong(key, value, "an integer or a string of digits")
        if value not in _INT64:
            self._wrong(key, value, "an integer of at most 64 bits", "a larger one")
        return value

    def identity(self, key: str) -> Identity:
        """An id that only serves to tell records apart: an integer or a string, compared as stored."""
        value = self.fields.get(key, _ABSENT)
        if type(value) is not int and type(value) is not str:
            self._wrong(key, value, "an integer or a string")
        return value

    def path(self, key: str, folder: Folder) -> str:
        """A stored file name joined to the folder it must stay in."""
        value = self.fields.get(key, _ABSENT)
        if type(value) is not str:
            self._wrong(key, value, "a string")
        problem = folder.problem(value)
        if problem is not None:
            raise self.error(key, f"is {value!r}, which {problem}; only names inside {folder} are accepted")
        return folder.join(value)

    def check_characters(self, key: str, value: str) -> None:
        """Refuse a string with a lone surrogate, which JSON escapes can smuggle in."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(key, f"holds half of a surrogate pair at character {error.start}") from error

    def error(self, key: str, problem: str) -> DatasetError:
        return DatasetError(f"{self.file}: record {self.number} (counted from 0): the key {key!r} {problem}.")

    def _wrong(self, key: str, value: Any, wanted: str, found: str | None = None) -> NoReturn:
        if value is _ABSENT:
            raise self.error(key, f"is missing; it must hold {wanted}")
        raise self.error(key, f"must hold {wanted}, not {found or _kind(value)}")


def _all_finite(values: list[Any]) -> bool:
    if set(map(type, values)) == {float} and math.isfinite(sum(values)):
        return True  # the common case
    for value in values:
        if type(value) is float:
            if value - value != 0.0:  # inf (from 1e999, say) and NaN
                return False
        elif type(value) is not int or value not in _INT64:
            return False
    return True


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would block for ever
            raise DatasetError(f"{name} is a folder or a device, not a JSON file; give the annotation file itself.")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise DatasetError(f"The annotation file {name} does not exist; check the path and the data folder.") from error
    except OSError as error:
        raise DatasetError(f"The annotation file {name} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL in the path
        raise DatasetError(f"The annotation file {name!r} cannot be opened: {error}.") from error


def _read_text(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    with _open(path) as file:
        data = file.read()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise DatasetError(f"{name} is not UTF-8 (it looks like UTF-16 or UTF-32); save it again as UTF-8.")
    try:
        text = str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{name} is not UTF-8: a wrong byte on line {line}; save it again as UTF-8.") from error
    if not text or text.isspace():
        raise DatasetError(f"{name} is empty; a JSON list of objects is needed, get or make the file again.")
    return text


def _bad_json(path: str | os.PathLike[str], text: str, error: Exception, number: int | None = None) -> DatasetError:
    name = os.fspath(path)
    record = "" if number is None else f" in record {number} (counted from 0)"
    if isinstance(error, json.JSONDecodeError):
        cut = "" if error.doc[error.pos :].strip() else "; the file seems to be cut short, get it again"
        # An unterminated string is reported where it starts, though it runs to the end of the file.
        if error.msg.startswith("Unterminated string"):
            cut = "; the file may be cut short"
        return DatasetError(
            f"{name} is not valid JSON: line {error.lineno}, column {error.colno}{record}: {error.msg}{cut}."
        )
    if isinstance(error, RecursionError):
        return DatasetError(f"{name} cannot be read: values are nested too deeply{record}.")
    if isinstance(error, _NotStrictJSON):
        return DatasetError(f"{name} is not valid JSON{record}: {error}.")
    return DatasetError(f"{name} cannot be read: a number is too long{record}.")  # int() refuses over 4300 digits
