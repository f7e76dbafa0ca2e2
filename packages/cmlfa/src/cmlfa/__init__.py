"""CMLFA: cross-modal latent feature aligning for text-to-image person re-identification.

The names below are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmlfa.datasets import SimpleTokenizer, tokenize
    from cmlfa.model import CMLFA, build_model, load_checkpoint
    from cmlfa.options import get_args

__version__ = "0.1.0"
__all__ = ["CMLFA", "SimpleTokenizer", "build_model", "get_args", "load_checkpoint", "tokenize"]

_HOME = {
    "CMLFA": "cmlfa.model",
    "SimpleTokenizer": "cmlfa.datasets",
    "build_model": "cmlfa.model",
    "get_args": "cmlfa.options",
    "load_checkpoint": "cmlfa.model",
    "tokenize": "cmlfa.datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
