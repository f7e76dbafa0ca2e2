"""Exact streaming similarity ranking and retrieval metrics, shared by the evaluation of all packages.

Queries are scored against the gallery in blocks; only what the metrics need is ranked. The result is exactly what a
stable descending sort of the complete score matrix gives: equal scores keep the order of the gallery.

* `retrieve`: features to metrics, without holding all scores;
* `rank`: a score matrix to metrics, with the signature of the IRRA family;
* `evaluate_rows`: any callable that yields rows of scores;
* `score_rows`, `similarity`: scores only; `best_of_rows`: the best positions of rows of scores;
* `rerank`, `rerank_rows`: fusion of first-stage and matching scores (MRA).

`retrieval` reads from top to bottom and calls `scores` (with `reductions` and `selection_network`), `topk`, `metrics` and
`sharded`; `fusion` is the re-ranking.
"""

import lazy_loader

# Lazy, because a command that only prints its help must not import torch. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
