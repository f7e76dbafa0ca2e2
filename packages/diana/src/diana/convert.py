"""DiaNA's models beside weight files: sizes from `config.json`, or read off the shapes."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diana.model.config import DiaNAConfig
from diana.model.diana import DiaNAModel
from diana.model.towers import build_llama, build_vision
from diana.model.weights import without_buffers
from tbps_common.models.contents import Contents
from tbps_common.models.layouts import Description, layer_numbers

_SWIN_PREFIX, _LLAMA_PREFIX = "swinv2.", "model."
_PARTS = ("vision_config", "llama_config", "refiner_config")


def describe_diana(contents: Contents) -> Description:
    """A checkpoint of DiaNA beside the network of its configuration, or else of its shapes."""
    state, config = without_buffers(contents.state), contents.config
    if config is None or not all(isinstance(config.get(part), Mapping) for part in _PARTS):
        config = _form_of(state)
    with torch.device("meta"):
        model = DiaNAModel(DiaNAConfig(**config), adapters=any(".lora_A." in name for name in state))
    refiner = state.get("refiner.attr_query_token")
    sizes = {
        "image tower": _swin_sizes(model.vision_model.config),
        "dialogue tower": _llama_sizes(model.llama_tower.config),
        "joint space": len(state["vision_projection.weight"]),
        "attributes": refiner.shape[1] if refiner is not None else "no refiner",
        "identities": "none are stored",
    }
    return Description(sizes, without_buffers(model.state_dict()), state)


def describe_swinv2(contents: Contents) -> Description:
    """A SwinV2 file beside DiaNA's image tower."""
    state = _without(contents.state, _SWIN_PREFIX, ("classifier.",))
    with torch.device("meta"):
        tower = build_vision(_fitting(contents.config, "swinv2") or _swin_form(state, ""))
    return Description({"image tower": _swin_sizes(tower.config)}, without_buffers(tower.state_dict()), state)


def describe_llama(contents: Contents) -> Description:
    """A Llama file beside DiaNA's dialogue tower."""
    state = _without(contents.state, _LLAMA_PREFIX, ("lm_head.",))
    with torch.device("meta"):
        tower = build_llama(_fitting(contents.config, "llama") or _llama_form(state, ""))
    return Description({"dialogue tower": _llama_sizes(tower.config)}, without_buffers(tower.state_dict()), state)


def _without(state: Mapping[str, Tensor], prefix: str, heads: tuple[str, ...]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    return without_buffers({name.removeprefix(prefix): tensor for name, tensor in kept.items()})


def _fitting(config: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    return config if config is not None and config.get("model_type") == kind else None


def _form_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    queries = state.get("refiner.attr_query_token")
    adapter = next((tensor for name, tensor in state.items() if ".lora_A." in name), None)
    plain = {re.sub(r"^llama\.base_model\.model\.|\.base_layer", "", name): tensor for name, tensor in state.items()}
    prefix = "" if adapter is not None else "llama."
    return {
        "vision_config": _swin_form(state, "vision_model."),
        "llama_config": _llama_form(plain if adapter is not None else state, prefix),
        "refiner_config": {
            "enable_refiner": queries is not None,
            "num_query": queries.shape[1] if queries is not None else 1,
            "num_hidden_layers": len(layer_numbers(state, "refiner.transformer.resblocks.")),
        },
        "embed_dim": len(state["vision_projection.weight"]),
        "use_llama_lora": len(adapter) if adapter is not None else 0,
    }


def _swin_form(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    layers = f"{prefix}encoder.layers."
    stages = layer_numbers(state, layers)
    patches = state[f"{prefix}embeddings.patch_embeddings.projection.weight"]
    return {
        "embed_dim": len(patches),
        "patch_size": patches.shape[-1],
        "depths": [len(layer_numbers(state, f"{layers}{stage}.blocks.")) for stage in stages],
        "num_heads": [len(state[f"{layers}{stage}.blocks.0.attention.self.logit_scale"]) for stage in stages],
        "mlp_ratio": len(state[f"{layers}0.blocks.0.intermediate.dense.weight"]) / len(patches),
    }


def _llama_form(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    layers = f"{prefix}layers."
    words, width = state[f"{prefix}embed_tokens.weight"].shape
    queries, keys = (len(state[f"{layers}0.self_attn.{name}_proj.weight"]) for name in "qk")
    # No shape tells how wide a head is: as wide as all keys, which gives matrices of the same shapes.
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": len(state[f"{layers}0.mlp.gate_proj.weight"]),
        "num_hidden_layers": len(layer_numbers(state, layers)),
        "num_attention_heads": queries // keys,
        "num_key_value_heads": 1,
        "head_dim": keys,
        "pad_token_id": None,
    }


def _swin_sizes(config: Any) -> str:
    return f"SwinV2, {config.embed_dim} wide at first, depths {'-'.join(map(str, config.depths))}"


def _llama_sizes(config: Any) -> str:
    return f"Llama, {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.vocab_size} words"
