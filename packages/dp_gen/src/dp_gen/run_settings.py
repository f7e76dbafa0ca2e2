"""The flags that decide a folder's content: a run that goes on must have the same, or the folder becomes a mixture."""

from pathlib import Path
from typing import Any

from tbps_common.datasets import read_json
from tbps_common.errors import InputError
from tbps_common.files import write_json


def require_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Compare with the settings that an earlier run stored, if there was one.

    Raises:
        InputError: they differ; names the flags.
    """
    if not path.is_file():
        return
    before = read_json(path)
    known = before if isinstance(before, dict) else {}
    changed = [name for name, value in settings.items() if known.get(name) != value]
    if changed:
        raise InputError(
            f"{path.parent} was begun with other values of --{', --'.join(changed)}: use the same values, or another folder"
        )


def store_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, whole or not at all."""
    write_json(path, settings)
