"""A trained model and the options it was trained with: what testing, pictures and search start from."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from cmlfa.model import CMLFA, build_model, clip_geometry, load_checkpoint
from cmlfa.options import Options
from cmlfa.run_directory import find_weights
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
from tbps_common.run.device import choose_device

# Flags that, beside the weights, decide the features.
FEATURE_FLAGS = ("img_size", "stride_size", "text_length", "lfa_attention")
_ENCODER = ("base_model.", "shared_transformer.", "safl.")


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode on its device."""

    options: Options
    model: CMLFA
    device: torch.device
    checkpoint: Path
    fingerprint: str
    """Of the encoders' weights as stored, and of the flags that decide the features."""


def open_trained(flags: argparse.Namespace, options: Options) -> TrainedModel:
    """Build the model of a run and load its weights.

    The sizes of the CLIP towers are taken from the checkpoint, so the file or download that training started from is
    not needed any more.

    Raises:
        InputError: a flag does not fit the weights, or the device is not there.
        CheckpointError: the weights are missing, damaged, or of another model.
    """
    checkpoint = find_weights(options, flags)
    device = choose_device(options.device)
    content = load_checkpoint_file(checkpoint, trust=flags.trust_checkpoint)
    state, _ = find_state_dict(content, source=str(checkpoint))
    geometry = clip_geometry(state, str(checkpoint), prefix="base_model.")
    classifier = state.get("classifier.weight")
    model = build_model(options, len(classifier) if classifier is not None else 1, geometry=geometry)
    try:
        load_checkpoint(model, content, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} does not fit the flags of {flags.config_file}: {error}") from error
    encoders = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODER)}
    settings = {name: getattr(options, name) for name in FEATURE_FLAGS}
    return TrainedModel(options, model.to(device).eval(), device, checkpoint, fingerprint(encoders, settings))
