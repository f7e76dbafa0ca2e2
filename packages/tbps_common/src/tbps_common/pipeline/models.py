"""Models of diffusers and transformers: named sensibly, loaded quietly, and one sentence if they cannot be."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from tbps_common.errors import InputError

Model = TypeVar("Model")

DTYPES = {
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
}


def require_libraries(command: str, extra: str, *libraries: str) -> None:
    """Check that the libraries of an extra are installed, without importing them.

    Raises:
        InputError: one is not; `extra` (such as `packages/fafa[syncpr]`) says how to install it.
    """
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(
            f"{command} needs {', '.join(absent)}: run  pip install '{extra}'  from the root of the checkout"
        )


def require_model(flag: str, name: str, *markers: str) -> None:
    """Refuse a name that can be neither a folder with a model nor a model of the Hugging Face hub.

    Args:
        flag: for messages.
        name: what it was given.
        markers: patterns of files, one of which the folder of such a model holds.

    Raises:
        InputError: it can be neither.
    """
    path = Path(name)
    if path.is_file():
        raise InputError(f"{flag} {name} is a file: name the model's folder, or a model of the Hugging Face hub")
    if path.is_dir():
        if not any(next(path.glob(marker), None) for marker in markers):
            raise InputError(f"{flag} {name} holds no model ({' or '.join(markers)}): name the folder of such a model")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{flag} {name} is not a folder: check the path, or give a name of the hub such as owner/name")


def load_model(flag: str, name: str, loader: Callable[[], Model]) -> Model:
    """Call `loader` without the libraries' own remarks, and put whatever goes wrong into one sentence.

    Raises:
        InputError: names the flag and the model.
    """
    try:
        with quiet_libraries():
            return loader()
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"{flag} {name} does not fit into memory: choose a smaller model, or 16 bits") from error
    except Exception as error:  # damaged files make the libraries fail with nearly any exception
        advice = (
            "check that the folder holds the kind of model this flag needs, complete"
            if Path(name).exists()
            else "there is no folder of this name; if it is a name of the hub, check it and the network (HF_HUB_OFFLINE "
            f"is {os.environ.get('HF_HUB_OFFLINE', 'not set')})"
        )
        raise InputError(f"{flag} {name} cannot be loaded ({first_line(error)}): {advice}") from error


def first_line(error: BaseException) -> str:
    """What a library complains of, short enough for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' remarks and progress bars; errors stay errors."""
    from transformers.utils import logging

    libraries = [logging]
    if "diffusers" in sys.modules:  # an extra, and not all stages use it
        from diffusers.utils import logging as diffusers_logging

        libraries.append(diffusers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def choose_dtype(precision: str, device: torch.device, on_gpu: str) -> torch.dtype:
    """The type of weights that are not trained.

    Args:
        precision: the flag, a name of `DTYPES` or `auto`.
        device: where they are.
        on_gpu: what `auto` means on a GPU; on the CPU it is always float32.
    """
    if precision == "auto":
        precision = on_gpu if device.type == "cuda" else "fp32"
    return DTYPES[precision]
