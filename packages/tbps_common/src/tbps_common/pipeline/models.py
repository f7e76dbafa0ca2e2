"""Models of diffusers and transformers: named sensibly, loaded quietly, and one sentence if they cannot be."""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from tbps_common.errors import InputError

Model = TypeVar("Model")

_LORA_PARAMETER = re.compile(r"\.lora_[AB]\.")
_LORA_TENSOR = re.compile(r"\.lora_[AB]\.|\.lora\.(?:down|up)\.")

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


def load_model(flag: str, name: str, loader: Callable[..., Model], **options: Any) -> Model:
    """`loader(name, **options)` without the libraries' own remarks; whatever goes wrong becomes one sentence.

    Raises:
        InputError: names the flag and the model.
    """
    try:
        with quiet_libraries():
            return loader(name, **options)
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


def require_effective_lora(flag: str, name: str, pipeline: Any) -> None:
    """Check that a LoRA which diffusers has loaded without complaint is really in the model, whole, and changes it.

    Args:
        flag: for messages.
        name: what was loaded: a safetensors file, a folder with one, or a name of the hub, whose file is not compared.
        pipeline: that it was loaded into; nothing is fused yet.

    Raises:
        InputError: the model uses none or only a part of its tensors, or they are zero or not finite.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    made = {of: value for part in parts for of, value in part.named_parameters() if _LORA_PARAMETER.search(of)}
    if not made:
        raise InputError(f"{flag} {name} holds no LoRA weights for {type(pipeline).__name__}: check the file")
    loaded = {of: value for of, value in made.items() if not value.is_meta}  # for the others the file had nothing
    stored: dict[str, Tensor] = {}
    for file in [Path(name)] if Path(name).is_file() else sorted(Path(name).glob("*.safetensors")):
        stored |= load_file(file)
    broken = [of for of, value in {**loaded, **stored}.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(f"{flag} {name} holds numbers that are not finite ({broken[0]}): take another file")
    # Other tools' layouts are converted on loading; diffusers' and peft's own tensors must be found again.
    present = {_mark(value) for value in loaded.values()}
    types = {value.dtype for value in loaded.values()}
    own = {of: value for of, value in stored.items() if _LORA_TENSOR.search(of)}
    unused = [of for of, value in own.items() if not any(_mark(value.to(dtype)) in present for dtype in types)]
    if unused:
        raise InputError(
            f"{flag} {name}: the model does not use {len(unused)} of its {len(own)} tensors ({', '.join(unused[:3])}): the "
            "file was made for another model, or has names that diffusers does not know"
        )
    if not any(bool(value.any()) for of, value in loaded.items() if ".lora_B." in of):
        raise InputError(f"{flag} {name} changes nothing: its matrices are zero; take the file of a trained LoRA")


def _mark(value: Tensor) -> tuple[tuple[int, ...], str]:
    content = value.detach().float().cpu().contiguous().numpy().tobytes()
    return tuple(value.shape), hashlib.sha256(content).hexdigest()


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
