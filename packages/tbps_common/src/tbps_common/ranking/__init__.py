"""Exact streaming similarity ranking and retrieval metrics, shared by the evaluation of all packages.

Queries are scored against the gallery in blocks; only what the metrics need is ranked. The result is exactly what a
stable descending sort of the complete score matrix gives: equal scores keep the order of the gallery.

* `retrieve`: features to metrics, without holding all scores;
* `rank`: a score matrix to metrics, with the signature of the IRRA family;
* `evaluate_rows`: any callable that yields rows of scores;
* `score_rows`, `similarity`: scores only; `best_of_rows`: the best positions of rows of scores;
* `rerank`, `rerank_rows`: fusion of first-stage and matching scores (MRA).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbps_common.ranking.evaluate import evaluate_rows
    from tbps_common.ranking.fusion import rerank, rerank_rows
    from tbps_common.ranking.matrix import rank
    from tbps_common.ranking.result import RetrievalResult
    from tbps_common.ranking.retrieval import retrieve
    from tbps_common.ranking.scores import score_rows, similarity
    from tbps_common.ranking.topk import best_of_rows

__all__ = [
    "RetrievalResult",
    "best_of_rows",
    "evaluate_rows",
    "rank",
    "rerank",
    "rerank_rows",
    "retrieve",
    "score_rows",
    "similarity",
]

_MODULES = {
    "RetrievalResult": "result",
    "best_of_rows": "topk",
    "evaluate_rows": "evaluate",
    "rank": "matrix",
    "rerank": "fusion",
    "rerank_rows": "fusion",
    "retrieve": "retrieval",
    "score_rows": "scores",
    "similarity": "scores",
}


def __getattr__(name: str) -> Any:
    # Lazy: a command that only prints its help must not import torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
