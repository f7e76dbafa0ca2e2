"""Dealing with the libraries of the extra `syncpr`: are they there, and can they be quiet."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tbps_common.errors import InputError


def require_extra(command: str, *modules: str) -> None:
    """Check that libraries of the extra are installed, without importing them.

    Raises:
        InputError: one is not.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"fafa-syncpr {command} needs {', '.join(missing)}: install the extra with "
            "pip install 'packages/fafa[syncpr]' from the root of the checkout"
        )


def require_model_folder(name: str, marker: str, flag: str) -> None:
    """Check a model's name as far as possible before the libraries are imported; hub names are left to them.

    Raises:
        InputError: it is a file, a path that does not exist, or a folder without the model's description.
    """
    path = Path(name)
    if path.is_file():
        raise InputError(f"{flag} {name} is a file: name the model's folder, or a model of the Hugging Face hub")
    if path.is_dir():
        if not (path / marker).is_file():
            raise InputError(f"{flag} {name} has no {marker}: name the folder of such a model")
    elif path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise InputError(f"{flag} {name} is not a folder, and no name of the Hugging Face hub: check the path")


def first_line(error: BaseException) -> str:
    """What a library complains of, short enough for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' remarks and progress bars; errors stay errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (transformers_logging, diffusers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    for library, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
