"""Queries and dialogues as files have them.

The queries are lines of JSON, or the rows of a CSV file, with these fields:

* what is asked: `text`, `image` (a file, relative to the file of queries), both, or `dialogue` (rounds as `diana-chat`
  writes them, or a file that holds them);
* what is right: `answers`, the paths of pictures in the gallery (in a CSV file with `;` between them), or `identity`, a
  value of the gallery's column that `--identity` names;
* `person`: who is asked for, where several identities or answers belong to one person. Intervals are over persons.
"""

import csv
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.images import read_image
from tbps_common.search.retriever import Query, Round

FIELDS = ("text", "image", "dialogue", "answers", "identity", "person")


@dataclass(frozen=True)
class Asked:
    """A query, and what answers it.

    Attributes:
        where: file and line, for messages.
        text: the person, or with a picture what is different.
        image: file of the picture.
        dialogue: rounds of question and answer.
        answers: paths in the gallery.
        identity: value of the gallery's column.
        person: of the intervals.
    """

    where: str
    text: str = ""
    image: str = ""
    dialogue: tuple[Round, ...] = ()
    answers: tuple[str, ...] = ()
    identity: str = ""
    person: str = ""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.dialogue:
            return "dialogue"
        return "+".join(name for name in ("image", "text") if getattr(self, name))

    def query(self) -> Query:
        """The query with its picture.

        Raises:
            DatasetError: the picture cannot be read.
        """
        return Query(self.text, read_image(self.image, as_shown=True) if self.image else None, self.dialogue)


def read_queries(file: str | os.PathLike[str]) -> list[Asked]:
    """Read a file of queries (see the module).

    Raises:
        InputError: it is absent, empty, or a query cannot be used.
    """
    path, found = Path(file), []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            records: list[tuple[int, Any]] = [(rows.line_num, _of_cells(row)) for row in rows]
        else:
            lines = enumerate(text.split("\n"), start=1)  # U+2028 and its like may stand in a JSON string
            records = [
                (number, _parsed(f"--queries {file}, line {number}", line)) for number, line in lines if line.strip()
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--queries {file} cannot be read ({error})") from error
    for number, record in records:
        found.append(_asked(f"--queries {file}, line {number}", path.parent, record))
    if not found:
        raise InputError(
            f"--queries {file} holds no queries: write one JSON object per line, or a CSV file with a header"
        )
    return found


def _of_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a CSV file as a line of JSON would have it."""
    record = {name: value for name, value in row.items() if value}
    if "answers" in record:
        record["answers"] = [path.strip() for path in record["answers"].split(";")]
    return record


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error


def _asked(where: str, folder: Path, record: Any) -> Asked:
    if not isinstance(record, dict):
        raise InputError(f'{where} must be a JSON object such as {{"text": ..., "answers": [...]}}')
    strange = [str(name) for name in record if name not in FIELDS]
    if strange:
        raise InputError(f"{where} has the unknown field {strange[0]!r}: use {', '.join(FIELDS)}")
    values: dict[str, Any] = {name: value for name, value in record.items() if value not in (None, "", [])}
    dialogue = values.pop("dialogue", ())
    try:
        rounds = read_dialogue(str(folder / dialogue)) if isinstance(dialogue, str) else dialogue
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--')}") from error
    if rounds and not is_dialogue(rounds):
        raise InputError(f"{where}: dialogue must be a list of rounds, each a list of messages with 'from' and 'value'")
    for name in ("identity", "person"):
        if isinstance(values.get(name), int):
            values[name] = str(values[name])
    for name in ("text", "image", "identity", "person"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{where}: {name} must be a string, not {values[name]!r}")
    answers = values.pop("answers", [])
    if not isinstance(answers, list) or not all(isinstance(path, str) and path for path in answers):
        raise InputError(f"{where}: answers must be a list of paths of pictures in the gallery")
    values["text"] = values.get("text", "").strip()
    asked = Asked(where, dialogue=tuple(rounds), answers=tuple(answers), **values)
    if asked.dialogue and (asked.text or asked.image):
        raise InputError(f"{where}: a dialogue stands alone: leave text and image out")
    if not asked.dialogue and not asked.image and not asked.text:
        raise InputError(f"{where} asks nothing: give text, image, both, or dialogue")
    if bool(asked.answers) == bool(asked.identity):
        raise InputError(f"{where}: give either answers or identity, so that a hit can be right or wrong")
    image = str(folder / asked.image) if asked.image else ""
    person = asked.person or asked.identity or "\n".join(sorted(asked.answers))
    return replace(asked, image=image, person=person)


def read_dialogue(file: str) -> list[Round]:
    """Rounds of a dialogue, as diana-chat writes them.

    Raises:
        InputError: the file holds no dialogue.
    """
    try:
        rounds = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--dialogue {file} cannot be read as a dialogue ({error})") from error
    if not is_dialogue(rounds):
        raise InputError(f"--dialogue {file} must be a list of rounds, each a list of messages with 'from' and 'value'")
    return list(rounds)


def is_dialogue(rounds: Any) -> bool:
    """Whether something is a list of rounds, each a list of messages with `from` and `value`."""
    try:
        return bool(rounds) and all(
            round and all(isinstance(one["from"], str) and isinstance(one["value"], str) for one in round)
            for round in rounds
        )
    except (TypeError, KeyError):
        return False
