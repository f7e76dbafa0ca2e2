"""Data of DiaNA: dialogue texts, annotation files, image transforms, masking, and the training items.

Importing this package loads neither torch nor torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diana.data.annotations import load_annotations, load_dataset_config
    from diana.data.masking import mask_token_ids
    from diana.data.text import (
        PROMPT_POOL,
        SYSTEM_PROMPT,
        clean_caption,
        render_caption,
        render_dialogue,
        split_chats,
    )
    from diana.data.training import Collate, TrainingDataset, build_training_dataset
    from diana.data.transforms import build_eval_transform, build_train_transform

__all__ = [
    "PROMPT_POOL",
    "SYSTEM_PROMPT",
    "Collate",
    "TrainingDataset",
    "build_eval_transform",
    "build_train_transform",
    "build_training_dataset",
    "clean_caption",
    "load_annotations",
    "load_dataset_config",
    "mask_token_ids",
    "render_caption",
    "render_dialogue",
    "split_chats",
]

_MODULES = {
    "PROMPT_POOL": "text",
    "SYSTEM_PROMPT": "text",
    "Collate": "training",
    "TrainingDataset": "training",
    "build_eval_transform": "transforms",
    "build_train_transform": "transforms",
    "build_training_dataset": "training",
    "clean_caption": "text",
    "load_annotations": "annotations",
    "load_dataset_config": "annotations",
    "mask_token_ids": "masking",
    "render_caption": "text",
    "render_dialogue": "text",
    "split_chats": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
