"""Diverse Person: an editor that makes training data for text-based person search.

The names below are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dp_gen.constants import DENOISE_MASK_PROB, IMAGE_TOKEN

if TYPE_CHECKING:
    from dp_gen.captions import encode_with_image_tokens, get_img_token_idx, insert_image_tokens, load_tokenizer
    from dp_gen.data import (
        DiversePersonDataset,
        Transform4TestWithSegmap,
        Transform4TrainWithSegmap,
        attribute_transforms,
        check_dataset,
        collate_fn,
        cut_attribute,
    )
    from dp_gen.generation.sampling import decode_latents, denoise
    from dp_gen.losses import BalancedL1Loss, attribute_localization_loss
    from dp_gen.model import (
        MLP,
        DiversePersonController,
        DiversePersonModel,
        DiversePersonPipeline,
        load_checkpoint,
        official_state_dict,
        supervised_cross_attentions,
    )
    from dp_gen.options import parse_args
    from dp_gen.training import build_lr_scheduler, build_optimizer, set_trainable

__version__ = "0.1.0"
__all__ = [
    "DENOISE_MASK_PROB",
    "IMAGE_TOKEN",
    "MLP",
    "BalancedL1Loss",
    "DiversePersonController",
    "DiversePersonDataset",
    "DiversePersonModel",
    "DiversePersonPipeline",
    "Transform4TestWithSegmap",
    "Transform4TrainWithSegmap",
    "attribute_localization_loss",
    "attribute_transforms",
    "build_lr_scheduler",
    "build_optimizer",
    "check_dataset",
    "collate_fn",
    "cut_attribute",
    "decode_latents",
    "denoise",
    "encode_with_image_tokens",
    "get_img_token_idx",
    "insert_image_tokens",
    "load_checkpoint",
    "load_tokenizer",
    "official_state_dict",
    "parse_args",
    "set_trainable",
    "supervised_cross_attentions",
]

_HOME = {
    "dp_gen.captions": ("encode_with_image_tokens", "get_img_token_idx", "insert_image_tokens", "load_tokenizer"),
    "dp_gen.data": (
        "DiversePersonDataset",
        "Transform4TestWithSegmap",
        "Transform4TrainWithSegmap",
        "attribute_transforms",
        "check_dataset",
        "collate_fn",
        "cut_attribute",
    ),
    "dp_gen.generation.sampling": ("decode_latents", "denoise"),
    "dp_gen.losses": ("BalancedL1Loss", "attribute_localization_loss"),
    "dp_gen.model": (
        "MLP",
        "DiversePersonController",
        "DiversePersonModel",
        "DiversePersonPipeline",
        "load_checkpoint",
        "official_state_dict",
        "supervised_cross_attentions",
    ),
    "dp_gen.options": ("parse_args",),
    "dp_gen.training": ("build_lr_scheduler", "build_optimizer", "set_trainable"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
