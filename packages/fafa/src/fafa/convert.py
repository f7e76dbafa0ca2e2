"""FAFA's models beside weight files: sizes read off their shapes; and the layout of the hub for a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fafa.model.fafa import FAFA, Blip2FAFACPR
from fafa.model.hub import parts_of
from fafa.model.qformer import QFormer
from fafa.model.settings import MODEL_CONFIG, ModelSettings, QFormerSettings, read_settings
from fafa.model.tokenizer import build_tokenizer
from fafa.model.vit import build_vit
from fafa.model.weights import POSITION_IDS, WORD_EMBEDDINGS, official_state_dict
from fafa.run_directory import HYPERPARAMETERS, Hyperparameters, read_hyperparameters
from fafa.transforms import MEAN, STD
from tbps_common.errors import CheckpointError, InputError
from tbps_common.models.contents import Contents
from tbps_common.models.hub import Checkpoint, Encoder, HubParts, evaluation_of
from tbps_common.models.layouts import Description, layer_numbers

_VIT = "visual_encoder."
_LAYER = "Qformer.bert.encoder.layer."
_SHAPED = ("vit_model", "vit_width", "vit_depth", "patch_size", "image_size", "embed_dim", "use_mlm")
# What LAVIS's files of a bare ViT hold beside the weights that BLIP-2 uses: the last block, and heads.
_BEYOND_THE_VIT = ("norm.", "fc_norm.", "head.", "ln_post.", "proj", "lm_head.", "mask_token")


def describe_blip2(contents: Contents) -> Description:
    """A checkpoint of FAFA or BLIP-2 beside the model of its sizes."""
    state = contents.state
    settings = settings_of(state, str(contents.path))
    words, width = state[WORD_EMBEDDINGS].shape
    with torch.device("meta"):
        qformer = QFormer(settings.qformer, words, settings.vit_width, settings.cross_attention_freq)
        model = FAFA(settings, None, build_vit(settings), qformer)
    has_vit = any(name.startswith(_VIT) for name in state)
    sizes = {
        "image tower": _vit_sizes(settings) if has_vit else "not in the file",
        "Q-Former": f"{settings.qformer.num_hidden_layers} layers, {width} wide, {settings.num_query_token} query tokens, "
        f"{words} words",
        "joint space": settings.embed_dim,
        "identities": "none are stored",
    }

    def optional(name: str) -> bool:
        # The frozen tower may be left out, a tied matrix may be stored once, and constants need not be there.
        return (not has_vit and name.startswith(_VIT)) or name == POSITION_IDS or ".cls.predictions.decoder." in name

    return Description(sizes, official_state_dict(model), state, optional)


def describe_vit(contents: Contents) -> Description:
    """A file of the bare ViT beside the tower of FAFA, which is one block shorter."""
    given = {_VIT + name: tensor for name, tensor in contents.state.items()}
    # The rest of the model does not count here; it is as small as it can be.
    qformer = QFormerSettings(hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
    whole = ModelSettings(**_vit_settings(given, str(contents.path)), qformer=qformer)
    blocks = whole.vit_depth - 1
    settings = replace(whole, vit_depth=blocks)
    with torch.device("meta"):
        own = FAFA(
            settings, None, build_vit(settings), QFormer(qformer, 1, settings.vit_width, settings.cross_attention_freq)
        )
    expected = {name: tensor for name, tensor in official_state_dict(own).items() if name.startswith(_VIT)}

    def optional(name: str) -> bool:
        stem = name.removeprefix(_VIT)
        last = re.match(r"(?:transformer\.res)?blocks\.(\d+)\.", stem)
        return stem.startswith(_BEYOND_THE_VIT) or (last is not None and int(last[1]) >= blocks)

    return Description({"image tower": _vit_sizes(whole)}, expected, given, optional)


def to_hub(checkpoint: Checkpoint) -> HubParts:
    """A checkpoint in the layout of the hub; the model is a YAML file or a built-in backbone, or what the run's folder says.

    Raises:
        InputError: model file or vocabulary are missing, or belong to another model.
    """
    source, state, tokenizer = checkpoint.path, checkpoint.state, checkpoint.tokenizer
    run = source.parent.parent
    recorded = run / HYPERPARAMETERS
    values = read_hyperparameters(recorded) if recorded.is_file() else Hyperparameters()
    own = run / MODEL_CONFIG
    backbone = checkpoint.config or (str(own) if own.is_file() else values.backbone if recorded.is_file() else None)
    if backbone is None:
        raise InputError(f"{source} is not in a run's folder: name its model with --config (pretrain, or a YAML file)")
    settings = read_settings(backbone, num_query_token=state["query_tokens"].shape[1])
    shaped = settings_of(state, str(source))
    differing = [name for name in _SHAPED if getattr(settings, name) != getattr(shaped, name)]
    if differing:
        raise InputError(
            f"{source} has another {differing[0]} than the model {backbone}: name the right one with --config"
        )
    if tokenizer or Path(settings.tokenizer).exists():
        words = build_tokenizer(tokenizer or settings.tokenizer).get_vocab()
    else:
        raise InputError(
            f"the vocabulary {settings.tokenizer} of {backbone} is not here: name a folder with --tokenizer"
        )
    if len(words) != len(state[WORD_EMBEDDINGS]):
        raise InputError(
            f"{source} has {len(state[WORD_EMBEDDINGS])} words and the vocabulary {len(words)}: name the right one with --tokenizer"
        )
    chosen = {name: value for name, value in asdict(values).items() if name not in ("backbone", "itcpr_root")}
    return replace(parts_of(state, settings, chosen, words), evaluation=evaluation_of(source, run))


def beside_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' files hold beside the weights: which epoch or step they are of, which nobody knows any more."""
    return {}


def encoders(folder: Path) -> list[Encoder]:
    """The gallery's encoder (image to tokens) and the query's (image and sentence to one vector) of a model of the hub."""
    model = Blip2FAFACPR.from_pretrained(folder)
    size, length = model.settings.image_size, model.max_txt_len

    def images(batch: int) -> dict[str, Tensor]:
        return {"images": torch.randn(batch, 3, size, size)}

    def queries(batch: int) -> dict[str, Tensor]:
        ends = torch.randint(2, length + 1, (batch, 1))
        mask = (torch.arange(length) < ends).long()
        return {**images(batch), "ids": torch.randint(5, len(model.tokenizer), (batch, length)) * mask, "mask": mask}

    def query_feature(model: Any, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return model.query_features(model.vit_states(images), {"input_ids": ids, "attention_mask": mask})

    pixels = f"RGB from 0 to 1, minus mean {MEAN}, divided by deviation {STD}"
    return [
        Encoder(
            "image",
            model,
            lambda model, images: model.target_features(model.vit_states(images)),
            images,
            f"{pixels}; similarity is the mean of the {model.fda_k} largest cosines with the tokens",
        ),
        Encoder(
            "query",
            model,
            query_feature,
            queries,
            f"{pixels}; token ids of BERT's tokenizer (vocab.txt) for the cleaned sentence, padded to {length}, and their mask",
        ),
    ]


def settings_of(state: Mapping[str, Tensor], source: str) -> ModelSettings:
    """The settings that make a model of the shapes of a checkpoint; what no shape tells keeps its default.

    Raises:
        CheckpointError: a tensor is missing, or the position table is not that of a square image.
    """
    layers = layer_numbers(state, _LAYER)
    fusing = [number for number in layers if f"{_LAYER}{number}.crossattention.self.query.weight" in state]
    qformer = QFormerSettings(
        hidden_size=state["query_tokens"].shape[2],
        num_hidden_layers=len(layers),
        num_attention_heads=1,
        intermediate_size=len(state[f"{_LAYER}0.intermediate.dense.weight"]),
        max_position_embeddings=len(state["Qformer.bert.embeddings.position_embeddings.weight"]),
        init_from=None,
    )
    predictor = state.get("mlm_predictor.predictor.0.weight")
    rest: dict[str, Any] = {
        "load_pretrained": False,
        "num_query_token": state["query_tokens"].shape[1],
        "cross_attention_freq": fusing[1] - fusing[0] if len(fusing) > 1 else len(layers),
        "embed_dim": len(state["vision_proj.weight"]),
        "max_txt_len": min(32, qformer.max_position_embeddings),
        "use_mlm": predictor is not None,
        "qformer": qformer,
    }
    if predictor is not None:
        rest["mfr_hidden_dim"] = len(predictor)
    if any(name.startswith(_VIT) for name in state):
        return ModelSettings(**_vit_settings(state, source) | rest)
    width = state[f"{_LAYER}{fusing[0]}.crossattention.self.key.weight"].shape[1]
    return ModelSettings(image_size=224, vit_width=width, vit_heads=1, vit_depth=1, **rest)


def _vit_settings(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    eva = f"{_VIT}patch_embed.proj.weight" in state
    patches = state[f"{_VIT}patch_embed.proj.weight" if eva else f"{_VIT}conv1.weight"]
    positions = state[f"{_VIT}pos_embed" if eva else f"{_VIT}positional_embedding"].shape[-2] - 1
    side = round(positions**0.5)
    if side * side != positions:
        raise CheckpointError(f"{source} has a table of {positions} patches, which is not that of a square image.")
    blocks = f"{_VIT}blocks." if eva else f"{_VIT}transformer.resblocks."
    width, patch = patches.shape[0], patches.shape[-1]
    hidden = len(state[f"{blocks}0.mlp.{'fc1' if eva else 'c_fc'}.weight"])
    return {
        "image_size": side * patch,
        "num_query_token": 1,
        "vit_model": "eva_clip_g" if eva else "clip_L",
        "patch_size": patch,
        "vit_width": width,
        "vit_depth": len(layer_numbers(state, blocks)),
        "vit_heads": 1,
        "vit_mlp_ratio": (hidden + 0.5) / width,
    }


def _vit_sizes(settings: ModelSettings) -> str:
    kind = "EVA-CLIP ViT" if settings.vit_model == "eva_clip_g" else "CLIP ViT"
    return (
        f"{kind}, {settings.vit_depth} blocks, {settings.vit_width} wide, patch {settings.patch_size}, "
        f"images of {settings.image_size} x {settings.image_size}"
    )
