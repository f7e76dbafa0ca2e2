"""FAFA: fine-grained adaptive feature alignment for composed person retrieval (loaded on first use)."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fafa.model.fafa import Blip2FAFACPR, load_model_and_preprocess

__version__ = "0.1.0"
__all__ = ["Blip2FAFACPR", "load_model_and_preprocess"]
__getattr__, _, _ = lazy_loader.attach(
    __name__, submod_attrs={"model.fafa": ["Blip2FAFACPR", "load_model_and_preprocess"]}
)
