"""MRA: text-based person retrieval, pre-trained on generated images with region phrases, fine-tuned, re-ranked.

The names below are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra.config import load_config
    from mra.data import (
        FinetuneDataset,
        PretrainDataset,
        RandomErasing,
        RetrievalTestDataset,
        build_transforms,
        region_attention,
    )
    from mra.model import Retrieval, interpolate_relative_pos_embed
    from mra.retrieval import encode_images, encode_texts, itm_rerank, retrieval_metrics
    from mra.solver import create_optimizer, lr_multiplier, param_groups
    from mra.text import TextMaskingGenerator, build_tokenizer, eda, mlm_batch, pre_caption, tokenize

__version__ = "0.1.0"
__all__ = [
    "FinetuneDataset",
    "PretrainDataset",
    "RandomErasing",
    "Retrieval",
    "RetrievalTestDataset",
    "TextMaskingGenerator",
    "build_tokenizer",
    "build_transforms",
    "create_optimizer",
    "eda",
    "encode_images",
    "encode_texts",
    "interpolate_relative_pos_embed",
    "itm_rerank",
    "load_config",
    "lr_multiplier",
    "mlm_batch",
    "param_groups",
    "pre_caption",
    "region_attention",
    "retrieval_metrics",
    "tokenize",
]

_HOME = {
    "mra.config": ("load_config",),
    "mra.data": (
        "FinetuneDataset",
        "PretrainDataset",
        "RandomErasing",
        "RetrievalTestDataset",
        "build_transforms",
        "region_attention",
    ),
    "mra.model": ("Retrieval", "interpolate_relative_pos_embed"),
    "mra.retrieval": ("encode_images", "encode_texts", "itm_rerank", "retrieval_metrics"),
    "mra.solver": ("create_optimizer", "lr_multiplier", "param_groups"),
    "mra.text": ("TextMaskingGenerator", "build_tokenizer", "eda", "mlm_batch", "pre_caption", "tokenize"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    # Importing a submodule of the same name (`mra.text.eda` and the function `eda`) would hide it otherwise.
    globals()[name] = value
    return value
