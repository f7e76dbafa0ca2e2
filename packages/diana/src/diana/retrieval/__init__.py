"""Retrieval with a DiaNA model: features of images and dialogues, scores, and the evaluation of a data set.

Importing this package does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diana.retrieval.dialogues import encode_dialogues, encode_turns
    from diana.retrieval.evaluation import Evaluation, evaluate
    from diana.retrieval.images import encode_images
    from diana.retrieval.scores import SummedRows, score_rows_of

__all__ = [
    "Evaluation",
    "SummedRows",
    "encode_dialogues",
    "encode_images",
    "encode_turns",
    "evaluate",
    "score_rows_of",
]

_MODULES = {
    "Evaluation": "evaluation",
    "SummedRows": "scores",
    "encode_dialogues": "dialogues",
    "encode_images": "images",
    "encode_turns": "dialogues",
    "evaluate": "evaluation",
    "score_rows_of": "scores",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
