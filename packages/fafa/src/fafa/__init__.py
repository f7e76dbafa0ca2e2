"""FAFA: fine-grained adaptive feature alignment for composed person retrieval.

The names below are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fafa.model import Blip2FAFACPR, load_model_and_preprocess

__version__ = "0.1.0"
__all__ = ["Blip2FAFACPR", "load_model_and_preprocess"]

_HOME = {"Blip2FAFACPR": "fafa.model", "load_model_and_preprocess": "fafa.model"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
