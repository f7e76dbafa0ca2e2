"""DiaNA: chat-based person retrieval by dialogue-refined cross-modal alignment (CVPR 2025).

The names below are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diana import data, losses, metrics, optim, retrieval, schedule, similarity, tokenizer
    from diana.model import DiaNAConfig, DiaNAModel, load_diana

__version__ = "0.1.0"
__all__ = [
    "DiaNAConfig",
    "DiaNAModel",
    "data",
    "load_diana",
    "losses",
    "metrics",
    "optim",
    "retrieval",
    "schedule",
    "similarity",
    "tokenizer",
]

_CLASSES = ("DiaNAConfig", "DiaNAModel", "load_diana")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CLASSES:
        return getattr(import_module("diana.model"), name)
    return import_module(f"{__name__}.{name}")
