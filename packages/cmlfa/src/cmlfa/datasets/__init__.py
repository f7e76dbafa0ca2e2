"""Captions, images and batches: tokenizer, masking, transforms, items, samplers, loaders; and the data-set readers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmlfa.datasets.items import ImageDataset, ImageTextDataset, ImageTextMLMDataset, TextDataset
    from cmlfa.datasets.loaders import build_dataloader, collate, prepare_batch
    from cmlfa.datasets.masking import mask_tokens
    from cmlfa.datasets.samplers import DistributedIdentitySampler, RandomIdentitySampler
    from cmlfa.datasets.tokenizer import SimpleTokenizer, tokenize
    from cmlfa.datasets.transforms import build_transforms
    from tbps_common.datasets import CUHKPEDES, DATASETS, ICFGPEDES, RSTPReid

__all__ = [
    "CUHKPEDES",
    "DATASETS",
    "ICFGPEDES",
    "DistributedIdentitySampler",
    "ImageDataset",
    "ImageTextDataset",
    "ImageTextMLMDataset",
    "RSTPReid",
    "RandomIdentitySampler",
    "SimpleTokenizer",
    "TextDataset",
    "build_dataloader",
    "build_transforms",
    "collate",
    "mask_tokens",
    "prepare_batch",
    "tokenize",
]

_HOME = {
    "CUHKPEDES": "tbps_common.datasets",
    "DATASETS": "tbps_common.datasets",
    "ICFGPEDES": "tbps_common.datasets",
    "RSTPReid": "tbps_common.datasets",
    "DistributedIdentitySampler": "cmlfa.datasets.samplers",
    "ImageDataset": "cmlfa.datasets.items",
    "ImageTextDataset": "cmlfa.datasets.items",
    "ImageTextMLMDataset": "cmlfa.datasets.items",
    "RandomIdentitySampler": "cmlfa.datasets.samplers",
    "SimpleTokenizer": "cmlfa.datasets.tokenizer",
    "TextDataset": "cmlfa.datasets.items",
    "build_dataloader": "cmlfa.datasets.loaders",
    "build_transforms": "cmlfa.datasets.transforms",
    "collate": "cmlfa.datasets.loaders",
    "mask_tokens": "cmlfa.datasets.masking",
    "prepare_batch": "cmlfa.datasets.loaders",
    "tokenize": "cmlfa.datasets.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
