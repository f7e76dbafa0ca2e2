"""The rows of an annotation run: read, checked, selected."""

import os
from dataclasses import dataclass
from typing import Any

from dp_gen.annotation.prompts import build_prompt
from tbps_common.pipeline.journal import read_json_lines


@dataclass(frozen=True)
class Row:
    """One line of the input.

    Attributes:
        index: line number, from 0.
        fields: as stored.
        instruction: the full prompt.
    """

    index: int
    fields: dict[str, Any]
    instruction: str


def select_rows(n: int, start: int, end: int) -> range:
    """Numbers of the rows from `start` up to but without `end`, of `n`; a negative `end` means through the last."""
    stop = n if end < 0 else min(end, n)
    return range(min(start, stop), stop)


def read_rows(path: str | os.PathLike[str], start: int, end: int) -> tuple[list[Row], list[str]]:
    """Rows of the selected lines, and a sentence `file:line: ...` for each that cannot be used.

    Raises:
        DatasetError: the file is missing or is not UTF-8.
    """
    lines = read_json_lines(path)
    selected = select_rows(lines[-1][0] + 1 if lines else 0, start, end)
    rows, problems = [], []
    for number, content in lines:
        if number not in selected:
            continue
        problem = content if isinstance(content, str) else _problem(content)
        if problem is not None:
            problems.append(f"{os.fspath(path)}:{number + 1}: {problem}")
        else:
            assert isinstance(content, dict)
            rows.append(Row(number, content, build_prompt(content)))
    return rows, problems


def _problem(fields: dict[str, Any]) -> str | None:
    description = fields.get("base_description")
    if not isinstance(description, str) or not description.strip():
        return "'base_description' must be a sentence"
    attributes = fields.get("reference_attribute_list")
    listed = [attributes] if isinstance(attributes, str) else attributes
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) and one.strip() for one in listed):
        return "'reference_attribute_list' must be a list of phrases, or one phrase"
    return None
