"""Where files of a command are found: the working directory first, then the copies that come with the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def find_shipped(path: str | os.PathLike[str]) -> Path:
    """`path` if it exists, else the copy of a `configs/...` file in the package, else `path` unchanged.

    So a folder with its own `configs/` overrides the released sizes, and everywhere else the released ones are found.
    """
    given = Path(path)
    if given.exists() or given.is_absolute() or given.parts[:1] != ("configs",):
        return given
    own = PACKAGE / given
    return own if own.is_file() else given
