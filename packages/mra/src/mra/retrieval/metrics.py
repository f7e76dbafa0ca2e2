"""R@k, mAP and mINP of a score matrix."""

import logging
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from torch import Tensor

from tbps_common.ranking import RetrievalResult, evaluate_rows

logger = logging.getLogger("mra.evaluate")

METRICS = ("R1", "R5", "R10", "mAP", "mINP")


def retrieval_metrics(scores: Tensor, g_pids: Iterable[Hashable], q_pids: Iterable[Hashable]) -> dict[str, float]:
    """Text-to-image metrics in percent; equal scores keep the order of the gallery.

    Args:
        scores: `[Q, G]`, higher is better.
        g_pids: G person ids (a sequence of anything hashable, or a tensor).
        q_pids: Q person ids. A query without an image of its person is left out, with a warning.

    Returns:
        `R1`, `R5`, `R10` (any correct image among the first k), `mAP` and `mINP`.

    Raises:
        ValueError: no query has an image of its person, sizes that do not fit, or scores that are not finite.
    """
    gallery, queries = integer_ids(g_pids, q_pids)
    result = evaluate_rows(lambda start, stop: scores[start:stop], queries, gallery, topk=0, on_missing="skip")
    warn_of_missing(result)
    return {name: result.metrics[name] for name in METRICS}


def integer_ids(g_pids: Iterable[Hashable], q_pids: Iterable[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Person ids of any kind as integers that agree between gallery and queries."""
    numbers: dict[Hashable, int] = {}
    parts = []
    for pids in (g_pids, q_pids):
        entries: Sequence[Hashable] = pids.tolist() if isinstance(pids, (Tensor, np.ndarray)) else list(pids)
        parts.append(np.array([numbers.setdefault(pid, len(numbers)) for pid in entries], dtype=np.int64))
    return parts[0], parts[1]


def warn_of_missing(result: RetrievalResult) -> None:
    """Say how many captions have no image to find."""
    if result.num_missing:
        logger.warning(
            "%d of %d captions have no image of their person in the gallery and are left out of the metrics",
            result.num_missing,
            result.num_queries,
        )
