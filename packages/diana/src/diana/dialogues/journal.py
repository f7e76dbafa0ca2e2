"""Finished items, one JSON line each, on the disk before the next is begun: a kill loses none and repeats none."""

import json
import os
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError


class Journal:
    """Append-only file beside the result.

    Args:
        path: of the journal.
        settings: decide the content of items; a journal of other settings is refused.

    Raises:
        InputError: the file belongs to other settings, or is damaged before its last line.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.items: dict[str, Any] = {}
        keep = self._read(settings) if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep is None:
            self._file = open(path, "wb")
            self._append({"settings": settings})
        else:
            # A kill in the middle of a line leaves a part of it, which the next line must not be glued to.
            self._file = open(path, "r+b")
            self._file.truncate(keep)
            self._file.seek(keep)

    def add(self, key: str, item: Any) -> None:
        """Put an item on the disk."""
        self._append({"key": key, "item": item})
        self.items[key] = item

    def close(self) -> None:
        self._file.close()

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, settings: dict[str, Any]) -> int | None:
        """Length of the whole lines; None: the file holds none."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        if not lines:
            return None
        for number, line in enumerate(lines):
            try:
                value = json.loads(line)
                if number:
                    self.items[value["key"]] = value["item"]
                elif value["settings"] != settings:
                    changed = sorted(
                        name
                        for name in {**settings, **value["settings"]}
                        if settings.get(name) != value["settings"].get(name)
                    )
                    raise InputError(
                        f"{self.path} was begun with another --{', --'.join(changed)}: go on with the same, write to "
                        "another --out, or delete it"
                    )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self.path} is damaged in line {number + 1}: delete it to begin anew") from error
        return end
