"""The pretrained parts, each from its folder or from the hub, in float32."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from dp_gen.model.hub import CLIP_MARKER, SD_MARKER, require_sd_folder, resolve_model
from tbps_common.errors import InputError

_SD_FLAG = "--pretrained_model_hf"
_CLIP_FLAG = "--image_encoder_hf"


def load_text_encoder(args: argparse.Namespace) -> Any:
    """transformers' `CLIPTextModel` of the Stable Diffusion model."""
    place = _sd_place(args, "text_encoder")
    return _load("text encoder", place, lambda: CLIPTextModel.from_pretrained(**place, dtype=torch.float32))


def load_vae(args: argparse.Namespace) -> Any:
    """diffusers' `AutoencoderKL`."""
    place = _sd_place(args, "vae")
    return _load("VAE", place, lambda: AutoencoderKL.from_pretrained(**place, torch_dtype=torch.float32))


def load_unet(args: argparse.Namespace) -> Any:
    """diffusers' `UNet2DConditionModel`."""
    place = _sd_place(args, "unet")
    return _load("U-Net", place, lambda: UNet2DConditionModel.from_pretrained(**place, torch_dtype=torch.float32))


def load_image_encoder(args: argparse.Namespace) -> Any:
    """The vision half of a CLIP model with its projection, as transformers' `CLIPVisionModelWithProjection`."""
    name = resolve_model(args.image_encoder_hf, marker=CLIP_MARKER, flag=_CLIP_FLAG, cache_dir=args.cache_dir)
    encoder, info = _load(
        "image encoder",
        {"pretrained_model_name_or_path": name},
        lambda: CLIPVisionModelWithProjection.from_pretrained(
            name, cache_dir=args.cache_dir, dtype=torch.float32, output_loading_info=True
        ),
    )
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise InputError(
            f"{_CLIP_FLAG} {args.image_encoder_hf} is missing {len(missing)} weights of CLIP's vision half ({missing[0]}): "
            "name a whole CLIP model"
        )
    return encoder


def load_training_scheduler(args: argparse.Namespace, **overrides: Any) -> Any:
    """`DDPMScheduler` with the noise schedule of the Stable Diffusion model."""
    place = _sd_place(args, "scheduler", weights=False)
    return _load("scheduler", place, lambda: DDPMScheduler.from_pretrained(**place, **overrides))


def load_generation_scheduler(args: argparse.Namespace) -> Any:
    """The scheduler that the Stable Diffusion model names itself (PNDM for version 1.5)."""
    place = _sd_place(args, "scheduler", weights=False)
    return _load("scheduler", place, lambda: _named_scheduler(place))


def _named_scheduler(place: dict[str, Any]) -> Any:
    config = DDPMScheduler.load_config(**place)
    assert isinstance(config, dict)
    name = config.get("_class_name", "PNDMScheduler")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"its configuration names {name!r}, which is not a scheduler of diffusers")
    return kind.from_config(config)  # type: ignore[attr-defined]


def _sd_place(args: argparse.Namespace, part: str, *, weights: bool = True) -> dict[str, Any]:
    origin = {"revision": args.revision, "cache_dir": args.cache_dir}
    name = resolve_model(args.pretrained_model_hf, marker=SD_MARKER, flag=_SD_FLAG, **origin)
    if Path(name).is_dir():
        require_sd_folder(name, _SD_FLAG)
    place = {"pretrained_model_name_or_path": name, "subfolder": part, **origin}
    if weights and args.variant:
        place["variant"] = args.variant
    return place


def _load(what: str, place: dict[str, Any], load: Callable[[], Any]) -> Any:
    try:
        with quiet_libraries():
            return load()
    except InputError:
        raise
    except Exception as error:  # damaged files make the libraries fail with nearly any exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        model = place["pretrained_model_name_or_path"]
        raise InputError(f"the {what} of {model} cannot be loaded ({reason}): check that model's files") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' lists of weights that are left aside on purpose, and their progress bars."""
    before = [(library, library.get_verbosity()) for library in (transformers_logging, diffusers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    for library, _ in before:
        library.set_verbosity(logging.CRITICAL)  # what goes wrong is raised too
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
