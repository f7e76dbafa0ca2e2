"""The model side of MRA: network, official names, start weights. It never imports the training side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra.model.position_tables import interpolate_relative_pos_embed
    from mra.model.retrieval import Retrieval
    from mra.model.settings import ModelSettings

__all__ = ["ModelSettings", "Retrieval", "interpolate_relative_pos_embed"]

_HOME = {
    "ModelSettings": "mra.model.settings",
    "Retrieval": "mra.model.retrieval",
    "interpolate_relative_pos_embed": "mra.model.position_tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
