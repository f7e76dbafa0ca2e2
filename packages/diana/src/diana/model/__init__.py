"""The model side of DiaNA: towers, refiner, checkpoints. It never imports the training side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diana.model.config import DiaNAConfig
    from diana.model.diana import DiaNAModel, DiaNAOutput, load_diana
    from diana.model.refiner import AttributeRefiner

__all__ = ["AttributeRefiner", "DiaNAConfig", "DiaNAModel", "DiaNAOutput", "load_diana"]

_HOME = {
    "AttributeRefiner": "diana.model.refiner",
    "DiaNAConfig": "diana.model.config",
    "DiaNAModel": "diana.model.diana",
    "DiaNAOutput": "diana.model.diana",
    "load_diana": "diana.model.diana",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
