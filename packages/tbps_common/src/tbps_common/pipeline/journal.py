"""A JSON-lines file that grows by whole lines and survives a kill at any moment."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path

Record = dict[str, Any]


class Journal:
    """One JSON object per line; every line is on the disk before `append` returns.

    While it is open no other process can open it (where the system knows file locks).

    Attributes:
        path: the file; it and its folder are created.
        records: of the readable lines found at opening, in file order.
        unreadable: the other lines, as they stand in the file.
        torn: whether a last line without its end, left by a killed process, was cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file and repair its end.

        Raises:
            InputError: another process writes it, or it is a folder.
            OSError: it cannot be written.
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder: give the name of a file to write")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(self.path, "ab")
        try:
            _lock(self._file, self.path)
            self.records, self.unreadable, self.torn = self._repair()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Add one line, with one write, and flush it to the disk.

        Raises:
            OSError: the disk is full, say; the file is as before then.
        """
        line = encode(record)
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = os.write(self._file.fileno(), line)
            if written != len(line):
                os.write(self._file.fileno(), line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self._file.fileno(), before)
            error.filename = error.filename or str(self.path)
            raise
        self.records.append(record)

    def rewrite(self, records: list[Record]) -> None:
        """Replace the file's records, whole or not at all; unreadable lines stay, at the top."""
        if records == self.records and not self.unreadable:
            return
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            file.writelines(self.unreadable)
            file.writelines(encode(record) for record in records)
        replaced = open(self.path, "ab")
        self._file.close()
        self._file = replaced
        _lock(self._file, self.path)
        self.records = list(records)

    def _repair(self) -> tuple[list[Record], list[bytes], bool]:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        last = content[end:]
        torn = bool(last) and _decode(last) is None
        if torn:
            os.truncate(self._file.fileno(), end)
            content = content[:end]
        elif last:  # complete but for its line end: no cut object can be read as one
            os.write(self._file.fileno(), b"\n")
        records, unreadable = [], []
        for line in content.splitlines(keepends=True):
            record = _decode(line)
            if record is not None:
                records.append(record)
            elif line.strip():
                unreadable.append(line if line.endswith(b"\n") else line + b"\n")
        return records, unreadable, torn


def encode(record: Record) -> bytes:
    """One line of JSON.

    Raises:
        ValueError: the record holds NaN, infinity or half of a surrogate pair.
    """
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_json_lines(path: str | os.PathLike[str]) -> list[tuple[int, Record | str]]:
    """Every line of a JSON-lines file that is not blank, with its number from 0: the object, or what is wrong with it.

    Raises:
        DatasetError: the file is missing, cannot be read, or is not UTF-8 throughout (UTF-16, say).
    """
    name = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"The file {name} does not exist; check the path.") from error
    except OSError as error:
        raise DatasetError(f"The file {name} cannot be read: {error.strerror or error}.") from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise DatasetError(f"{name} is not UTF-8 (it looks like UTF-16 or UTF-32); save it again as UTF-8.")
    lines: list[tuple[int, Record | str]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        if line.strip():
            lines.append((number, _parse(line)))
    return lines


def _decode(line: bytes) -> Record | None:
    value = _parse(line)
    return None if isinstance(value, str) else value


def _parse(line: bytes) -> Record | str:
    """The object of a line, or why it is not a JSON object that could be written again."""
    try:
        text = line.decode("utf-8")
        value = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(value, dict):
            return "it is not a JSON object"
        if "\\ud" in text or "\\uD" in text:
            encode(value)
    except UnicodeError as error:
        return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it holds half of a surrogate pair"
    except json.JSONDecodeError as error:
        return f"it is not valid JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "its values are nested too deeply"
    except ValueError as error:
        return f"it is not valid JSON ({str(error)[:100]})"
    return value


def refuse_constant(name: str) -> NoReturn:
    """For `parse_constant` of json: NaN and infinity are not JSON, though Python reads them."""
    raise ValueError(f"{name} is not a JSON value")


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another run: wait for it, or choose another file") from None
    except OSError:  # a file system without locks
        return
