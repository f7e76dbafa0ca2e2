"""From rows of scores to CMC, AP, INP and first rank, without sorting the rows.

The 1-based rank of a positive at gallery position j with score s, in the stable descending order of its row, is

    1 + #{l : s_l > s} + #{l < j : s_l = s}

so counting is enough. Its score is read from the very row it is compared with: another kernel may round differently.
Every average is in float64.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tbps_common.ranking.compute import run_all

# A query with more positives than this first looks at the columns that reach its worst positive.
_COUNT_EACH = 3
_SORT_AT_MOST = 2048
_GPU_SLICE_ELEMENTS = 1 << 23


class Positives:
    """Gallery positions that share the identity of each query.

    Attributes:
        counts: int64 `[Q]`, number of positives of each query.
    """

    def __init__(self, query_ids: np.ndarray, gallery_ids: np.ndarray) -> None:
        self._by_id = np.argsort(gallery_ids, kind="stable")
        ordered = gallery_ids[self._by_id]
        self._first = np.searchsorted(ordered, query_ids, side="left")
        self.counts = np.searchsorted(ordered, query_ids, side="right") - self._first

    def of_queries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Bounds `[stop - start + 1]` and positions: query i owns `positions[bounds[i]:bounds[i + 1]]`, ascending."""
        counts = self.counts[start:stop]
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
        return bounds, self._by_id[np.repeat(self._first[start:stop], counts) + within]


def read_scores(block: Tensor, bounds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Scores of the positives as float64; -inf where the position lies outside the block's columns."""
    rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    here = (positions >= 0) & (positions < block.shape[1])
    scores = np.full(len(positions), -np.inf)
    where = [torch.from_numpy(index[here]).to(block.device) for index in (rows, positions)]
    scores[here] = block[where[0], where[1]].double().cpu().numpy()
    return scores


def count_ahead(block: Tensor, bounds: np.ndarray, positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How many columns of the block stand before each positive.

    Args:
        block: `[B, N]` scores, contiguous.
        bounds: `[B + 1]`; query i owns the positives `bounds[i]:bounds[i + 1]`.
        positions: column of each positive, ascending within a query; negative or N and above when it lies in an earlier
            or later part of the gallery.
        scores: float64 score of each positive, exactly as in its row.

    Returns:
        int64, one count for each positive.
    """
    return (_count_on_cpu if block.device.type == "cpu" else count_by_slots)(block, bounds, positions, scores)


def _count_on_cpu(block: Tensor, bounds: np.ndarray, positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    # numpy's count_nonzero, because torch widens the comparison to int64 before it adds: 5 to 10 times slower.
    rows = block.numpy()
    scores = scores.astype(rows.dtype)  # exact: they were read from rows of this type
    positions = positions.clip(0, rows.shape[1])
    ahead = np.zeros(len(positions), np.int64)
    workers = min(torch.get_num_threads(), len(rows))
    edges = [len(rows) * worker // workers for worker in range(workers + 1)]
    run_all(partial(_count_rows, rows, bounds, positions, scores, ahead), list(zip(edges, edges[1:])))
    return ahead


def _count_rows(
    rows: np.ndarray,
    bounds: np.ndarray,
    positions: np.ndarray,
    scores: np.ndarray,
    ahead: np.ndarray,
    part: tuple[int, int],
) -> None:
    count = np.count_nonzero
    for index in range(*part):
        first, last = int(bounds[index]), int(bounds[index + 1])
        row = rows[index]
        if last - first > _COUNT_EACH:
            reaching = np.flatnonzero(row >= scores[first:last].min())
            if len(reaching) <= _SORT_AT_MOST:
                ahead[first:last] = _count_sorted(row[reaching], reaching, positions[first:last], scores[first:last])
                continue
        for positive in range(first, last):
            position, score = positions[positive], scores[positive]
            ahead[positive] = count(row[:position] >= score) + count(row[position:] > score)


def _count_sorted(values: np.ndarray, columns: np.ndarray, positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`count_ahead` of one row, from its columns that can stand before any positive."""
    order = np.argsort(-values, kind="stable")
    descending, columns = -values[order], columns[order]
    above = np.searchsorted(descending, -scores, side="left")
    through = np.searchsorted(descending, -scores, side="right")
    for slot in range(len(positions)):
        run = columns[above[slot] : through[slot]]
        above[slot] += np.searchsorted(run, positions[slot])
    return above


def count_by_slots(block: Tensor, bounds: np.ndarray, positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same on an accelerator: the m-th positive of all queries at once, one comparison pass over the block each."""
    device, columns = block.device, block.shape[1]
    counts = np.diff(bounds)
    slots = int(counts.max(initial=0))
    filled = np.arange(slots) < counts[:, None]
    slot_positions = np.zeros(filled.shape, np.int64)
    slot_scores = np.full(filled.shape, np.inf)
    slot_positions[filled], slot_scores[filled] = positions, scores
    position = torch.from_numpy(slot_positions).to(device)
    score = torch.from_numpy(slot_scores).to(block.dtype).to(device)
    ahead = torch.zeros((len(block), slots), dtype=torch.int64, device=device)
    column = torch.arange(columns, device=device)
    step = max(1, _GPU_SLICE_ELEMENTS // max(1, columns))
    for start in range(0, len(block), step):
        part = slice(start, min(start + step, len(block)))
        for slot in range(slots):
            border = score[part, slot : slot + 1]
            before = column < position[part, slot : slot + 1]
            ahead[part, slot] = ((block[part] > border) | ((block[part] == border) & before)).sum(dim=1)
    return ahead.cpu().numpy()[filled]


class QueryMetrics(NamedTuple):
    """One entry for each query.

    Attributes:
        ap: average precision, a fraction.
        inp: inverse negative penalty, a fraction.
        first_rank: 1-based rank of the first positive.
    """

    ap: np.ndarray
    inp: np.ndarray
    first_rank: np.ndarray


def query_metrics(counts: np.ndarray, ranks: np.ndarray, absent_value: float, absent_rank: int) -> QueryMetrics:
    """AP, INP and first rank of every query.

    With the sorted 1-based ranks r_1 < ... < r_n of its positives, AP = 1/n sum_m m / r_m and INP = n / r_n.

    Args:
        counts: int64 `[Q]`, positives of each query.
        ranks: 1-based ranks of all positives, query by query, in any order within a query.
        absent_value: AP and INP of a query without a positive.
        absent_rank: its first rank.
    """
    ends = np.cumsum(counts)
    queries = np.repeat(np.arange(len(counts)), counts)
    ranks = ranks[np.lexsort((ranks, queries))]
    place = np.arange(1, len(ranks) + 1) - np.repeat(ends - counts, counts)
    found = counts > 0
    ap, inp = np.full((2, len(counts)), absent_value)
    ap[found] = np.bincount(queries, weights=place / ranks, minlength=len(counts))[found] / counts[found]
    inp[found] = counts[found] / ranks[ends[found] - 1]
    first_rank = np.full(len(counts), absent_rank, np.int64)
    first_rank[found] = ranks[(ends - counts)[found]]
    return QueryMetrics(ap, inp, first_rank)


def summarise(values: QueryMetrics, missing: np.ndarray, max_rank: int) -> tuple[dict[str, float], np.ndarray]:
    """Averages over the queries that count.

    Args:
        values: per-query values; NaN marks a query that does not count.
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
