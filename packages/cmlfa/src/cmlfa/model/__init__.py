"""The model side of CMLFA: network, start weights, checkpoints. It never imports the training side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmlfa.model.clip import ClipGeometry, clip_geometry, resize_pos_embed
    from cmlfa.model.cmlfa import CMLFA, build_model
    from cmlfa.model.safl import SAFL
    from cmlfa.model.settings import ModelSettings
    from cmlfa.model.weights import load_checkpoint, official_param_order

__all__ = [
    "CMLFA",
    "SAFL",
    "ClipGeometry",
    "ModelSettings",
    "build_model",
    "clip_geometry",
    "load_checkpoint",
    "official_param_order",
    "resize_pos_embed",
]

_HOME = {
    "CMLFA": "cmlfa.model.cmlfa",
    "SAFL": "cmlfa.model.safl",
    "ClipGeometry": "cmlfa.model.clip",
    "ModelSettings": "cmlfa.model.settings",
    "build_model": "cmlfa.model.cmlfa",
    "clip_geometry": "cmlfa.model.clip",
    "load_checkpoint": "cmlfa.model.weights",
    "official_param_order": "cmlfa.model.weights",
    "resize_pos_embed": "cmlfa.model.clip",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
