"""The trained model of a run directory, ready for features: what inference and search start from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fafa.model.fafa import Blip2FAFACPR, place
from fafa.model.settings import ModelSettings, read_settings
from fafa.model.weights import StateDictMismatch, required_keys
from fafa.run_directory import HYPERPARAMETERS, TrainedRun
from fafa.transforms import TransformPair, build_transforms
from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
from tbps_common.run.device import choose_device

logger = logging.getLogger("fafa.trained")

# Weights that decide features; the others are heads of losses.
_ENCODER = ("query_tokens", "visual_encoder.", "ln_vision.", "Qformer.bert.", "vision_proj.", "text_proj.")


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode on its device, with the transforms of its run."""

    model: Blip2FAFACPR
    transforms: TransformPair
    fingerprint: str
    """Of the encoders' weights and of the settings that decide the features."""


def open_trained(run: TrainedRun, device_name: str, *, trust: bool = False) -> TrainedModel:
    """Build the model of a run and load its weights.

    Start weights are fetched only if the checkpoint leaves the frozen ViT out.

    Args:
        run: of `fafa.run_directory.read_run`.
        device_name: of `--device`; a GPU that is not there gives the CPU and a message.
        trust: read a checkpoint that could run code.

    Raises:
        InputError: the weights are damaged or of another model, or a setting does not fit them.
    """
    content = load_checkpoint_file(run.checkpoint, trust=trust, mmap=True)
    state, _ = find_state_dict(content, source=str(run.checkpoint))
    tokens = state.get("query_tokens")
    stored_tokens = tokens.shape[1] if tokens is not None and tokens.dim() == 3 else None
    settings = read_settings(run.backbone, num_query_token=stored_tokens)
    values = run.hyperparameters
    if values.fda_k > settings.num_query_token:
        raise InputError(
            f"{run.directory / HYPERPARAMETERS} has fda_k {values.fda_k}, but the model has only "
            f"{settings.num_query_token} query tokens: correct fda_k"
        )
    model = place(_loaded(settings, state, str(run.checkpoint)), _device(device_name)).eval()
    model.fda_k, model.fda_alpha = values.fda_k, values.fda_alpha
    model.dispersion_loss.margin = values.fd_margin
    decisive = {
        "transform": values.transform,
        "target_ratio": values.target_ratio if values.transform == "targetpad" else None,
        "image_size": settings.image_size,
        "max_txt_len": settings.max_txt_len,
    }
    encoder = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODER)}
    transforms = build_transforms(values.transform, settings.image_size, values.target_ratio)
    return TrainedModel(model, transforms, fingerprint(encoder, decisive))


def _loaded(settings: ModelSettings, state: Mapping[str, Tensor], source: str) -> Blip2FAFACPR:
    has_vit = any(name.startswith("visual_encoder.") for name in state)
    absent = [name for name in required_keys(settings) if name not in state]
    missing = [name for name in absent if has_vit or not name.startswith("visual_encoder.")]
    lost = [name for name in missing if name.startswith(_ENCODER)]
    if lost:
        raise CheckpointError(
            f"{source} is missing {len(lost)} weights of the model, such as {lost[0]}: it belongs to another model; name its "
            "backbone with --backbone"
        )
    try:
        start = settings.without_start_weights() if has_vit else settings
        model, result = Blip2FAFACPR.from_state_dict(start.to_mapping(), state)
    except StateDictMismatch as error:
        raise CheckpointError(
            f"{source} does not fit the model ({error}): name the backbone it was trained with, with --backbone"
        ) from error
    for what, names in (("missing in", missing), ("unknown in", result.unexpected_keys)):
        if names:
            logger.warning("%d weights are %s %s, such as %s", len(names), what, source, names[0])
    return model


def _device(name: str) -> torch.device:
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        print("no GPU can be used: computing on the CPU")
        name = "cpu"
    return choose_device(name)
