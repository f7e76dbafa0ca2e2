"""The five numbers of an evaluation, from scores: R@1, R@5, R@10, mAP and the mean rank of the first match."""

import logging
from typing import Any

from torch import Tensor

from tbps_common.errors import InputError
from tbps_common.ranking import RetrievalResult, evaluate_rows

logger = logging.getLogger("diana.metrics")

NAMES = {"r1": "R1", "r5": "R5", "r10": "R10", "mAP": "mAP", "mfr": "mFR"}
"""Names of this package, and of `tbps_common.ranking`."""


def metric_eval(sim: Tensor, image_pids: Any, text_pids: Any) -> dict[str, float]:
    """Metrics of a score matrix; equal scores keep the order of the gallery.

    Args:
        sim: `[Q, G]`, one row per query; not changed.
        image_pids: integer identities `[G]`.
        text_pids: integer identities `[Q]`.

    Returns:
        `r1`, `r5`, `r10`, `mAP` in percent, and `mfr`, the mean 0-based rank of the first match (0 is perfect). Queries
        without a match in the gallery are left out, with a warning.

    Raises:
        ValueError: no query has a match, shapes do not fit, or the scores are not finite.
    """
    if sim.dim() != 2 or len(sim) != len(text_pids):
        raise InputError(f"sim must have one row for each of {len(text_pids)} queries, but it is {list(sim.shape)}.")
    result = evaluate_rows(lambda start, stop: sim[start:stop], text_pids, image_pids, topk=0, on_missing="skip")
    warn_of_missing(result)
    return metrics_of(result)


def metrics_of(result: RetrievalResult) -> dict[str, float]:
    """The five numbers of a result, under this package's names."""
    return {name: result.metrics[shared] for name, shared in NAMES.items()}


def warn_of_missing(result: RetrievalResult) -> None:
    """One warning if queries had no match in the gallery."""
    if result.num_missing:
        logger.warning(
            "%d of %d queries have no image of their person in the gallery and are left out",
            result.num_missing,
            result.num_queries,
        )
