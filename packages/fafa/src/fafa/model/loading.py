"""Models ready for use: built, loaded, cast and placed, with their processors (LAVIS's `load_model_and_preprocess`)."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fafa.model.blip2 import Blip2FAFACPR
from fafa.model.settings import read_settings
from fafa.model.start_weights import local_file
from fafa.processors import BlipCaptionProcessor, blip_image_train
from tbps_common.errors import InputError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

NAME = "blip2_fafa_cpr"

Processors = dict[str, Callable[[Any], Any]]


def load_model_and_preprocess(
    name: str,
    model_type: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    *,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Blip2FAFACPR, Processors, Processors]:
    """Build a model with its start weights and processors.

    Args:
        name: `blip2_fafa_cpr`.
        model_type: built-in backbone or path of a YAML file.
        model_path: checkpoint (path or https URL) loaded over the start weights; keys need not agree.
        is_eval: evaluation mode; else training mode.
        device: where to put it. On a GPU a frozen ViT's matrices are stored as `vit_precision` says.
        overrides: settings in place of the configuration's; None: not given.

    Returns:
        The model, image processors and text processors; both with the keys `train` and `eval`.

    Raises:
        InputError: an unknown name, a wrong setting, a file that cannot be used.
    """
    from fafa.transforms import inference_transform

    if name != NAME:
        raise InputError(f"--blip-model-name must be {NAME}, but it is {name!r}.")
    settings = read_settings(model_type, **(overrides or {}))
    if model_path is None:
        model = Blip2FAFACPR.from_config(settings.to_mapping())
    else:
        path = local_file(model_path)
        state, _ = find_state_dict(load_checkpoint_file(path, mmap=True), source=str(path))
        model, _ = Blip2FAFACPR.from_state_dict(settings.to_mapping(), state)
    place(model, device).train(not is_eval)
    text = BlipCaptionProcessor()
    images = {"train": blip_image_train(settings.image_size), "eval": inference_transform(settings.image_size)}
    return model, images, {"train": text, "eval": text}


def place(model: Blip2FAFACPR, device: str | torch.device) -> Blip2FAFACPR:
    """Move a model; on a GPU store a frozen ViT's matrices in its `vit_precision`, on a CPU everything in float32."""
    device = torch.device(device)
    if device.type == "cpu":
        return model.float().to(device)
    model.store_vit_in_half()
    return model.to(device)
