"""CMLFA's models beside weight files: sizes read off their shapes; and the layout of the hub for a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmlfa.config import CONFIG_NAME, load_train_configs
from cmlfa.datasets.transforms import MEAN, STD
from cmlfa.model.clip import ClipGeometry, build_clip, clip_geometry
from cmlfa.model.cmlfa import CMLFA
from cmlfa.model.hub import parts_of
from cmlfa.model.settings import ModelSettings
from cmlfa.model.tokenizer import MASK_ID, shared_tokenizer, tokenize
from cmlfa.options import default_options
from tbps_common.errors import InputError
from tbps_common.models.contents import Contents
from tbps_common.models.hub import Checkpoint, Encoder, HubParts, evaluation_of
from tbps_common.models.layouts import Description, layer_numbers

_PREFIX = "base_model."
_PLACES = ("root_dir", "output_dir", "pretrain_choice", "resume", "resume_ckpt_file", "local_rank")
# Sizes that OpenAI's archives store beside the weights, a mask that they compute, and the temperature.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_scale")


def describe_cmlfa(contents: Contents) -> Description:
    """A checkpoint of CMLFA beside the network of its sizes."""
    state, source = contents.state, str(contents.path)
    geometry = clip_geometry(state, source, prefix=_PREFIX)
    settings = settings_of(state, geometry)
    persons = len(state["classifier.weight"]) if "classifier.weight" in state else None
    with torch.device("meta"):
        model = CMLFA(settings, geometry, persons or 1)
    sizes = _clip_sizes(geometry, settings) | {
        "identities": persons if persons is not None else "no classifier",
        "prototypes": settings.num_prototypes,
        "layers": f"{settings.lfa_layers} of the shared transformer, {settings.cmt_depth if settings.has_mlm else 0} cross-modal",
    }
    return Description(sizes, model.state_dict(), state)


def describe_clip(contents: Contents) -> Description:
    """A CLIP model beside the towers of CMLFA."""
    state = contents.state
    geometry = clip_geometry(state, str(contents.path))
    settings = settings_of({_PREFIX + name: tensor for name, tensor in state.items()}, geometry)
    with torch.device("meta"):
        clip = build_clip(geometry, settings.img_size, settings.stride_size)
    return Description(_clip_sizes(geometry, settings), clip.state_dict(), state, lambda name: name in _NOT_WEIGHTS)


def to_hub(checkpoint: Checkpoint) -> HubParts:
    """A checkpoint in the layout of the hub, with the flags of its `configs.yaml`, or else the released ones.

    Raises:
        InputError: the flags belong to a model of another size.
    """
    source, state = checkpoint.path, checkpoint.state
    beside_it = source.parent / CONFIG_NAME
    path = checkpoint.config or (str(beside_it) if beside_it.is_file() else None)
    flags = default_options() if path is None else load_train_configs(path)
    settings = ModelSettings.of(flags)
    geometry = clip_geometry(state, str(source), prefix=_PREFIX)
    rows, columns = geometry.grid(settings.img_size, settings.stride_size)
    shaped = settings_of(state, geometry)
    patches = shaped.img_size[0] // geometry.patch_size
    if rows * columns != patches or settings.num_prototypes != shaped.num_prototypes:
        raise InputError(
            f"{source} has {patches} patches and {shaped.num_prototypes} prototypes, but the flags of {path or 'the released code'} "
            f"give {rows} x {columns} and {settings.num_prototypes}: name the {CONFIG_NAME} of its training with --config"
        )
    # A folder to share says nothing of the machine; and the losses are those whose heads are there.
    shared = {name: value for name, value in flags.items() if name not in _PLACES}
    shared |= {"lfa_layers": shaped.lfa_layers, "cmt_depth": shaped.cmt_depth, "vocab_size": shaped.vocab_size}
    if (settings.has_classifier, settings.has_mlm) != (shaped.has_classifier, shaped.has_mlm):
        shared["loss_names"] = shaped.loss_names
    return replace(parts_of(state, shared), evaluation=evaluation_of(source, source.parent))


def beside_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' files hold beside the weights: nothing."""
    return {}


def encoders(folder: Path) -> list[Encoder]:
    """The two encoders of a model in the layout of the hub, in float32."""
    model = CMLFA.from_pretrained(folder).float()
    settings = model.settings
    caption = tokenize("a person", shared_tokenizer(), settings.text_length)
    note = ""
    if settings.lfa_attention == "batch":
        note = "; trained with --lfa_attention batch: a feature depends on the batch it is computed in"

    def images(batch: int) -> dict[str, Tensor]:
        return {"images": torch.randn(batch, 3, *settings.img_size)}

    def texts(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(1, MASK_ID, (batch, settings.text_length))
        ids[:, [0, -1]] = caption[[0, int(caption.argmax())]]
        return {"ids": ids}

    return [
        Encoder(
            "image",
            model,
            lambda model, images: normalize(model.encode_image(images), dim=1),
            images,
            f"RGB from 0 to 1, minus mean {MEAN}, divided by deviation {STD}{note}",
        ),
        Encoder(
            "text",
            model,
            lambda model, ids: normalize(model.encode_text(ids), dim=1),
            texts,
            f"token ids of CMLFA's tokenizer, padded with 0 to {settings.text_length}{note}",
        ),
    ]


def settings_of(state: Mapping[str, Tensor], geometry: ClipGeometry) -> ModelSettings:
    """The settings that make a network of the shapes of a CMLFA checkpoint.

    What no shape tells keeps its default. How many rows of patches an image has is not told either: they are put into one column.
    """
    patches = len(state[f"{_PREFIX}visual.positional_embedding"]) - 1
    prototypes, fc = state.get("safl.part_tokens"), state.get("mlm_head.fc.weight")
    losses = ["sdm", *(["id"] if "classifier.weight" in state else []), *(["mlm"] if fc is not None else [])]
    return ModelSettings(
        img_size=(patches * geometry.patch_size, geometry.patch_size),
        stride_size=geometry.patch_size,
        text_length=geometry.context_length,
        vocab_size=len(fc) if fc is not None else geometry.vocab_size,
        loss_names="+".join(losses),
        cmt_depth=len(layer_numbers(state, "cross_modal_transformer.resblocks.")) or 1,
        num_prototypes=len(prototypes) if prototypes is not None else 1,
        lfa_layers=len(layer_numbers(state, "shared_transformer.resblocks.")) or 1,
        lfa_heads=1,
    )


def _clip_sizes(geometry: ClipGeometry, settings: ModelSettings) -> dict[str, object]:
    patches = settings.img_size[0] // geometry.patch_size
    return {
        "image tower": f"ViT, {geometry.vision_layers} layers, {geometry.vision_width} wide, patch {geometry.patch_size}, "
        f"{patches} patches",
        "text tower": f"{geometry.text_layers} layers, {geometry.text_width} wide, {geometry.context_length} tokens, "
        f"{geometry.vocab_size} words",
        "joint space": geometry.embed_dim,
    }
