"""CMC, AP, INP and first rank from the ranks of the positives; every average in float64."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class QueryMetrics:
    """One entry for each query.

    Attributes:
        ap: average precision, a fraction; NaN without a positive.
        inp: inverse negative penalty, a fraction; NaN without a positive.
        first_rank: 1-based rank of the first positive; 0 without one.
    """

    ap: np.ndarray
    inp: np.ndarray
    first_rank: np.ndarray


def query_metrics(bounds: np.ndarray, ranks: np.ndarray) -> QueryMetrics:
    """AP, INP and first rank of every query.

    With the sorted 1-based ranks r_1 < ... < r_n of its positives, AP = 1/n sum_m m / r_m and INP = n / r_n.

    Args:
        bounds: int64 `[Q + 1]`; query i owns `ranks[bounds[i]:bounds[i + 1]]`.
        ranks: 1-based ranks, in any order within a query.
    """
    counts = np.diff(bounds)
    queries = np.repeat(np.arange(len(counts)), counts)
    ranks = ranks[np.lexsort((ranks, queries))]
    place = np.arange(1, len(ranks) + 1) - np.repeat(bounds[:-1], counts)
    found = counts > 0
    ap, inp = np.full((2, len(counts)), np.nan)
    ap[found] = np.bincount(queries, weights=place / ranks, minlength=len(counts))[found] / counts[found]
    inp[found] = counts[found] / ranks[bounds[1:][found] - 1]
    first_rank = np.zeros(len(counts), np.int64)
    first_rank[found] = ranks[bounds[:-1][found]]
    return QueryMetrics(ap, inp, first_rank)


def apply_missing(values: QueryMetrics, num_gallery: int, on_missing: str) -> QueryMetrics:
    """Under `miss` a query without positive counts AP = INP = 0 and first rank G + 1."""
    if on_missing != "miss":
        return values
    missing = values.first_rank == 0
    return QueryMetrics(
        np.where(missing, 0.0, values.ap),
        np.where(missing, 0.0, values.inp),
        np.where(missing, num_gallery + 1, values.first_rank),
    )


def summarise(values: QueryMetrics, missing: np.ndarray, max_rank: int) -> tuple[dict[str, float], np.ndarray]:
    """Averages over the queries that count.

    Args:
        values: per-query values after `apply_missing`; NaN marks a query that does not count.
        missing: bool `[Q]`, queries without positive.
        max_rank: length of the CMC curve.

    Returns:
        `R1 R5 R10 mAP mINP` in percent and the 0-based mean first rank `mFR`, and CMC@1..max_rank in percent.
    """
    counted = ~np.isnan(values.ap)
    hits = np.bincount(np.minimum(values.first_rank[counted & ~missing], max(max_rank, 10) + 1))
    reached = np.zeros(max(max_rank, 10) + 1, np.int64)
    reached[: len(hits)] = hits[: len(reached)]
    cmc = 100.0 * np.cumsum(reached)[1:] / counted.sum()
    metrics = {
        "R1": cmc[0],
        "R5": cmc[4],
        "R10": cmc[9],
        "mAP": 100.0 * values.ap[counted].mean(),
        "mINP": 100.0 * values.inp[counted].mean(),
        "mFR": (values.first_rank[counted] - 1).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}, cmc[:max_rank]
