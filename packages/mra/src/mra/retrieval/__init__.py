"""Retrieval: encode texts and images, rank by similarity, re-rank the best by matching, measure, report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra.retrieval.encode import encode_images, encode_texts
    from mra.retrieval.evaluation import EvaluationStopped, SplitEvaluation, evaluate_split
    from mra.retrieval.metrics import retrieval_metrics
    from mra.retrieval.report import write_reports
    from mra.retrieval.rerank import itm_rerank, match_logits

__all__ = [
    "EvaluationStopped",
    "SplitEvaluation",
    "encode_images",
    "encode_texts",
    "evaluate_split",
    "itm_rerank",
    "match_logits",
    "retrieval_metrics",
    "write_reports",
]

_HOME = {
    "EvaluationStopped": "evaluation",
    "SplitEvaluation": "evaluation",
    "encode_images": "encode",
    "encode_texts": "encode",
    "evaluate_split": "evaluation",
    "itm_rerank": "rerank",
    "match_logits": "rerank",
    "retrieval_metrics": "metrics",
    "write_reports": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
