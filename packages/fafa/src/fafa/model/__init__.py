"""The model side of FAFA; it never imports the training side. Loaded on first use: reading settings needs no torch."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fafa.model.fafa import Blip2FAFACPR, load_model_and_preprocess, place
    from fafa.model.settings import ModelSettings, read_model_config, write_model_config

__all__ = [
    "Blip2FAFACPR",
    "ModelSettings",
    "load_model_and_preprocess",
    "place",
    "read_model_config",
    "write_model_config",
]
__getattr__, _, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fafa": ["Blip2FAFACPR", "load_model_and_preprocess", "place"],
        "settings": ["ModelSettings", "read_model_config", "write_model_config"],
    },
)
