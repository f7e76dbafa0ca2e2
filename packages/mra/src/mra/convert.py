"""MRA's models beside weight files: sizes read off their shapes, or from the configuration that a checkpoint holds; and the hub."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mra.config import load_config
from mra.data.transforms import MEAN, STD
from mra.model.bert import TextEncoder
from mra.model.hub import parts_of
from mra.model.network import Retrieval
from mra.model.settings import LINEAR_HEAD_WIDTH, TextSettings, VisionSettings
from mra.model.swin import VisionEncoder
from mra.model.weights import CONSTANTS, is_new_in_bert, start_names_of_bert
from tbps_common.errors import InputError
from tbps_common.models.contents import Contents
from tbps_common.models.hub import Checkpoint, Encoder, HubParts, evaluation_of
from tbps_common.models.layouts import Description, layer_numbers

_TABLE = "relative_position_bias_table"


def describe_mra(contents: Contents) -> Description:
    """A checkpoint of MRA beside the network of its configuration, or else of its shapes."""
    state = contents.state
    model, known = network_of(contents)
    settings = model.settings
    sizes = {
        "image encoder": _swin_sizes(settings.vision, known),
        "text encoder": f"BERT, {settings.text.num_hidden_layers} layers ({settings.text.fusion_layer} of text alone), "
        f"{settings.text.hidden_size} wide, {settings.text.vocab_size} words",
        "joint space": settings.embed_dim,
        "identities": "none are stored",
    }
    return Description(sizes, _weights(model), _without_constants(state), lambda name: not known and _TABLE in name)


def describe_swin(contents: Contents) -> Description:
    """A Swin file beside MRA's image encoder."""
    settings = VisionSettings.from_config(_vision_form(contents.state, ""), str(contents.path))
    with torch.device("meta"):
        encoder = VisionEncoder(settings)
    return Description(
        {"image encoder": _swin_sizes(settings, False)},
        _weights(encoder),
        _without_constants(contents.state),
        lambda name: name.startswith("head."),
    )


def describe_bert(contents: Contents) -> Description:
    """A BERT file beside MRA's text encoder, whose later layers have a cross-attention that no BERT has."""
    found = start_names_of_bert(contents.state)
    form = _text_form(found, "")
    settings = TextSettings.from_config(form | {"fusion_layer": form["num_hidden_layers"] - 1}, str(contents.path))
    with torch.device("meta"):
        encoder = TextEncoder(settings, settings.hidden_size)
    sizes = {
        "text encoder": f"BERT, {settings.num_hidden_layers} layers, {settings.hidden_size} wide, "
        f"{settings.vocab_size} words, {settings.max_position_embeddings} positions"
    }
    return Description(sizes, encoder.state_dict(), found, is_new_in_bert)


def to_hub(checkpoint: Checkpoint) -> HubParts:
    """A checkpoint in the layout of the hub, with the configuration that it holds, or of a YAML file.

    Raises:
        InputError: there is no configuration or no vocabulary, or they belong to another model.
    """
    source, state, config = checkpoint.path, checkpoint.state, checkpoint.config
    settings = load_config(config) if config else checkpoint.beside.get("config")
    if not isinstance(settings, Mapping):
        raise InputError(
            f"{source} holds no configuration: name the one of its training with --config configs/cuhk.yaml"
        )
    known = network_of(Contents(source, (source,), "", dict(state), {}, dict(settings)))[1]
    if not known:
        raise InputError(
            f"the configuration {config or 'in ' + str(source)} belongs to a network of another size: name the right one with "
            "--config"
        )
    parts = parts_of(state, settings, checkpoint.tokenizer or str(settings.get("text_encoder", "")))
    return replace(parts, evaluation=evaluation_of(source, source.parent))


def beside_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside the weights: the configuration, with the vocabulary where the released ones have it."""
    stored = {name: value for name, value in config.items() if name != "model_type"}
    return {"config": {**stored, "text_encoder": "data/bert-base-uncased"}}


def encoders(folder: Path) -> list[Encoder]:
    """The two encoders of a model in the layout of the hub; the fusion encoder, which judges pairs, is not among them."""
    model = Retrieval.from_pretrained(folder)
    settings, length = model.settings, model.settings.max_tokens

    def images(batch: int) -> dict[str, Tensor]:
        return {"images": torch.randn(batch, 3, settings.vision.height, settings.vision.width)}

    def texts(batch: int) -> dict[str, Tensor]:
        ends = torch.randint(3, length + 1, (batch, 1))
        mask = (torch.arange(length) < ends).long()
        return {"ids": torch.randint(1, settings.text.vocab_size, (batch, length)) * mask, "mask": mask}

    return [
        Encoder(
            "image",
            model,
            lambda model, images: normalize(model.get_image_feat(model.get_vision_embeds(images)[0]), dim=-1),
            images,
            f"RGB from 0 to 1, minus mean {MEAN}, divided by deviation {STD}",
        ),
        Encoder(
            "text",
            model,
            lambda model, ids, mask: normalize(model.get_text_feat(model.get_text_embeds(ids, mask)), dim=-1),
            texts,
            f"token ids of BERT's tokenizer (vocab.txt), padded to {length}, and their mask; the padding is part of the feature",
        ),
    ]


def network_of(contents: Contents) -> tuple[Retrieval, bool]:
    """The network of a checkpoint, without weights, and whether its configuration is stored (else it is read off the shapes)."""
    state = contents.state
    for stored in (contents.config, contents.beside.get("config")):
        if isinstance(stored, Mapping):
            try:
                with torch.device("meta"):
                    model = Retrieval(stored, init_backbones=False)
            except (InputError, OSError):
                continue
            own, given = _weights(model), _without_constants(state)
            # Paths in a configuration may lead to other files than they did at the time.
            if own.keys() == given.keys() and all(given[name].shape == own[name].shape for name in own):
                return model, True
    text = _text_form(state, "text_encoder.")
    linear = "vision_proj.weight" in state
    form = {
        "vision_config": _vision_form(state, "vision_encoder."),
        "text_config": text,
        "embed_dim": LINEAR_HEAD_WIDTH if linear else len(state["vision_proj.2.weight"]),
        "max_tokens": min(56, text["max_position_embeddings"]),
    }
    with torch.device("meta"):
        return Retrieval(form, init_backbones=False), False


def _vision_form(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    stages = layer_numbers(state, f"{prefix}layers.")
    tables = [state[f"{prefix}layers.{stage}.blocks.0.attn.{_TABLE}"] for stage in stages]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    width = len(state[f"{prefix}patch_embed.proj.weight"])
    return {
        # No shape tells the size of the images: the smallest square that the windows divide in every stage.
        "h": 32 * window,
        "w": 32 * window,
        "window_size": window,
        "embed_dim": width,
        "depths": [len(layer_numbers(state, f"{prefix}layers.{stage}.blocks.")) for stage in stages],
        "num_heads": [table.shape[1] for table in tables],
        "vision_width": 8 * width,
    }


def _text_form(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    layers = f"{prefix}bert.encoder.layer."
    words, width = state[f"{prefix}bert.embeddings.word_embeddings.weight"].shape
    fusing = [
        number for number in layer_numbers(state, layers) if f"{layers}{number}.crossattention.self.key.weight" in state
    ]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": len(layer_numbers(state, layers)),
        "fusion_layer": min(fusing, default=0),
        "num_attention_heads": 1,
        "intermediate_size": len(state[f"{layers}0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state[f"{prefix}bert.embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(state[f"{prefix}bert.embeddings.token_type_embeddings.weight"]),
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return _without_constants(model.state_dict())


def _without_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(CONSTANTS)}


def _swin_sizes(settings: VisionSettings, known: bool) -> str:
    size = f", images of {settings.height} x {settings.width}" if known else ""
    depths = "-".join(map(str, settings.depths))
    return f"Swin, {settings.embed_dim} wide at first, depths {depths}, window {settings.window}{size}"
