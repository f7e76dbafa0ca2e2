"""Loading models of diffusers and transformers: safetensors only, no code from the hub, one line if it fails."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from tbps_common.errors import InputError

Model = TypeVar("Model")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(flag: str, name: str, loader: Callable[[], Model]) -> Model:
    """Call `loader`, and put whatever goes wrong into one sentence.

    Raises:
        InputError: names the flag and the model.
    """
    try:
        return loader()
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(
            f"{flag} {name} does not fit into memory: choose a smaller model or --precision fp16"
        ) from error
    except Exception as error:  # the libraries raise nearly everything: OSError, ValueError, SafetensorError, KeyError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        advice = (
            "check that the folder holds the kind of model this flag wants, whole"
            if Path(name).is_dir()
            else "there is no folder of this name; if it is a hub id, check it and the network (HF_HUB_OFFLINE is "
            f"{os.environ.get('HF_HUB_OFFLINE', 'not set')})"
        )
        raise InputError(f"{flag} {name} cannot be loaded ({reason}): {advice}") from error


def choose_dtype(precision: str, device: torch.device, on_gpu: str) -> torch.dtype:
    """The type of weights that are not trained.

    Args:
        precision: the flag.
        device: where they are.
        on_gpu: what `auto` means on a GPU; on the CPU it is always fp32.
    """
    if precision == "auto":
        precision = on_gpu if device.type == "cuda" else "fp32"
    return DTYPES[precision]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars: a stage has one."""
    from transformers.utils import logging

    switches = [logging]
    if "diffusers" in sys.modules:  # an extra, and not all stages use it
        from diffusers.utils import logging as diffusers_logging

        switches.append(diffusers_logging)
    shown = [switch.is_progress_bar_enabled() for switch in switches]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, before in zip(switches, shown):
            if before:
                switch.enable_progress_bar()
