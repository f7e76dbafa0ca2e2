"""The model side of FAFA: settings, towers, key layout, start weights. It never imports the training side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fafa.model.blip2 import Blip2FAFACPR
    from fafa.model.loading import load_model_and_preprocess, place
    from fafa.model.settings import ModelSettings, read_model_config, write_model_config

__all__ = [
    "Blip2FAFACPR",
    "ModelSettings",
    "load_model_and_preprocess",
    "place",
    "read_model_config",
    "write_model_config",
]

_HOME = {
    "Blip2FAFACPR": "blip2",
    "ModelSettings": "settings",
    "load_model_and_preprocess": "loading",
    "place": "loading",
    "read_model_config": "settings",
    "write_model_config": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
