"""Diverse Person's parts beside weight files: sizes read off their shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from dp_gen.model.controller import DiversePersonController
from dp_gen.model.weights import normalise
from tbps_common.models.contents import Contents
from tbps_common.models.layouts import Description, layer_numbers

# Parts of a Stable Diffusion folder that Diverse Person does not use.
_UNUSED = ("safety_checker.", "image_encoder.")


def describe_dp(contents: Contents) -> Description:
    """A checkpoint of Diverse Person or FastComposer beside the five parts of its sizes."""
    state = normalise(contents.state)
    parts = _stable_diffusion(state) | {
        "image_encoder": _clip_vision(state, "image_encoder."),
        "controller": DiversePersonController,
    }
    width = len(state["controller.layer_norm.weight"]) if "controller.layer_norm.weight" in state else 768
    with torch.device("meta"):
        modules = {name: build(width) if name == "controller" else build() for name, build in parts.items()}
    return _described(modules, state, lambda name: False)


def describe_stable_diffusion(contents: Contents) -> Description:
    """A Stable Diffusion folder beside its three parts."""
    state = normalise(contents.state)
    with torch.device("meta"):
        modules = {name: build() for name, build in _stable_diffusion(state).items()}
    return _described(modules, state, lambda name: name.startswith(_UNUSED))


def describe_unet(contents: Contents) -> Description:
    """The U-Net's file alone."""
    return _part(contents, "unet", _unet)


def describe_vae(contents: Contents) -> Description:
    """The VAE's file alone."""
    return _part(contents, "vae", _vae)


def describe_text_encoder(contents: Contents) -> Description:
    """The text encoder's file alone."""
    return _part(contents, "text_encoder", _clip_text)


def describe_clip(contents: Contents) -> Description:
    """A CLIP model beside the image encoder; its text half is not used."""
    with torch.device("meta"):
        encoder = _clip_vision(contents.state, "")()
    state = {
        name: tensor
        for name, tensor in contents.state.items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    sizes = {"image encoder": f"{sum(weight.numel() for weight in encoder.parameters()):,} weights"}
    return Description(sizes, encoder.state_dict(), state, lambda name: name.endswith(".position_ids"))


def _part(contents: Contents, name: str, builder: Any) -> Description:
    state = normalise({f"{name}.{key}": tensor for key, tensor in contents.state.items()})
    with torch.device("meta"):
        modules = {name: builder(state, f"{name}.")()}
    return _described(modules, state, lambda key: False)


def _described(modules: Mapping[str, nn.Module], state: Mapping[str, Tensor], optional: Any) -> Description:
    expected = {
        f"{part}.{name}": tensor for part, module in modules.items() for name, tensor in module.state_dict().items()
    }
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith(".position_ids")}
    sizes = {
        part: f"{sum(weight.numel() for weight in module.parameters()):,} weights" for part, module in modules.items()
    }
    return Description(sizes, expected, state, optional)


def _stable_diffusion(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "text_encoder": _clip_text(state, "text_encoder."),
        "vae": _vae(state, "vae."),
        "unet": _unet(state, "unet."),
    }


def _unet(state: Mapping[str, Tensor], prefix: str) -> Any:
    stages = layer_numbers(state, f"{prefix}down_blocks.")
    crossing = [bool(layer_numbers(state, f"{prefix}down_blocks.{stage}.attentions.")) for stage in stages]
    looks = next(name for name in state if name.startswith(prefix) and name.endswith("attn2.to_k.weight"))
    inward = next(name for name in state if name.startswith(prefix) and name.endswith("proj_in.weight"))
    settings: dict[str, Any] = dict(
        in_channels=state[f"{prefix}conv_in.weight"].shape[1],
        out_channels=len(state[f"{prefix}conv_out.weight"]),
        block_out_channels=tuple(len(state[f"{prefix}down_blocks.{stage}.resnets.0.conv1.weight"]) for stage in stages),
        layers_per_block=len(layer_numbers(state, f"{prefix}down_blocks.0.resnets.")),
        down_block_types=tuple("CrossAttnDownBlock2D" if looking else "DownBlock2D" for looking in crossing),
        up_block_types=tuple("CrossAttnUpBlock2D" if looking else "UpBlock2D" for looking in reversed(crossing)),
        cross_attention_dim=state[looks].shape[1],
        use_linear_projection=state[inward].dim() == 2,
        attention_head_dim=1,
        norm_num_groups=1,
    )
    return lambda: UNet2DConditionModel(**settings)


def _vae(state: Mapping[str, Tensor], prefix: str) -> Any:
    stages = layer_numbers(state, f"{prefix}encoder.down_blocks.")
    channels = tuple(len(state[f"{prefix}encoder.down_blocks.{stage}.resnets.0.conv1.weight"]) for stage in stages)
    settings: dict[str, Any] = dict(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=len(layer_numbers(state, f"{prefix}encoder.down_blocks.0.resnets.")),
        latent_channels=state[f"{prefix}decoder.conv_in.weight"].shape[1],
        norm_num_groups=1,
    )
    return lambda: AutoencoderKL(**settings)


def _clip_text(state: Mapping[str, Tensor], prefix: str) -> Any:
    words, width = state[f"{prefix}embeddings.token_embedding.weight"].shape
    settings: dict[str, Any] = dict(
        vocab_size=words,
        hidden_size=width,
        max_position_embeddings=len(state[f"{prefix}embeddings.position_embedding.weight"]),
        num_hidden_layers=len(layer_numbers(state, f"{prefix}encoder.layers.")),
        intermediate_size=len(state[f"{prefix}encoder.layers.0.mlp.fc1.weight"]),
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=words - 1,
        pad_token_id=None,
    )
    return lambda: CLIPTextModel(CLIPTextConfig(**settings))


def _clip_vision(state: Mapping[str, Tensor], prefix: str) -> Any:
    vision = f"{prefix}vision_model."
    patches = state[f"{vision}embeddings.patch_embedding.weight"]
    positions = len(state[f"{vision}embeddings.position_embedding.weight"]) - 1
    settings: dict[str, Any] = dict(
        hidden_size=len(patches),
        patch_size=patches.shape[-1],
        image_size=round(positions**0.5) * patches.shape[-1],
        num_hidden_layers=len(layer_numbers(state, f"{vision}encoder.layers.")),
        intermediate_size=len(state[f"{vision}encoder.layers.0.mlp.fc1.weight"]),
        projection_dim=len(state[f"{prefix}visual_projection.weight"]),
        num_attention_heads=1,
    )
    return lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
