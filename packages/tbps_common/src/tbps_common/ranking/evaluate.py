"""The core of every evaluation: rows of scores in, metrics and best positions out, one block of queries at a time."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tbps_common.errors import InputError
from tbps_common.ranking.inputs import ON_MISSING, check_choice, check_count, check_scores, identity_array
from tbps_common.ranking.memory import default_row_budget, is_out_of_memory, release_cached_memory, rows_within
from tbps_common.ranking.metrics import QueryMetrics, apply_missing, query_metrics, summarise
from tbps_common.ranking.positives import Positives, count_ahead, read_scores
from tbps_common.ranking.result import RetrievalResult
from tbps_common.ranking.sharded import Gallery, open_gallery, settling
from tbps_common.ranking.topk import best_of_rows

Rows = Callable[[int, int], Tensor]


def evaluate_rows(
    rows: Rows,
    q_pids: Any,
    g_pids: Any,
    *,
    topk: int = 10,
    max_rank: int = 10,
    on_missing: str = "error",
    row_budget: int | None = None,
    group: Any = None,
    progress: bool = False,
) -> RetrievalResult:
    """Rank whatever `rows` scores.

    Args:
        rows: `rows(start, stop) -> [stop - start, G]` scores of a range of queries, any float dtype, any device. Called
            once for each block, in increasing order; a block that does not fit memory is asked for again in halves.
        q_pids: integer identities `[Q]` (tensor, array or sequence).
        g_pids: integer identities `[G]`.
        topk: best gallery positions to return for each query.
        max_rank: length of the CMC curve; beyond G it repeats its last value.
        on_missing: queries without a positive are an `error`, left out (`skip`), or counted as never found (`miss`).
        row_budget: bytes for one block of rows. By default 256 MiB on CPU, a quarter of the free memory on CUDA. The
            result does not depend on it.
        group: a `torch.distributed` group. Every process gives all queries, and rows and identities of its own shard of
            the gallery; every process returns the full result with positions in the shards joined in rank order.
        progress: show a bar over queries on stderr (first process only).

    Returns:
        Metrics, per-query values and best positions, on CPU.

    Raises:
        TypeError: identities that are not one-dimensional integers; scores that are not floating point.
        ValueError: an empty set, a bad option, rows of a wrong shape, NaN or infinity in the scores, queries without a
            positive (in any mode if none has one).
    """
    gallery = open_gallery(group)
    with settling(gallery):
        queries, own_ids = identity_array(q_pids, "q_pids"), identity_array(g_pids, "g_pids")
        check_count(topk, "topk", 0)
        check_count(max_rank, "max_rank", 1)
        check_choice(on_missing, "on_missing", ON_MISSING)
        if row_budget is not None:
            check_count(row_budget, "row_budget", 1)
        if len(queries) == 0:
            raise ValueError("q_pids is empty.")
    query_digest = hashlib.blake2b(queries.tobytes(), digest_size=16).hexdigest()
    gallery.same({"q_pids": query_digest, "topk": topk, "max_rank": max_rank, "on_missing": on_missing})
    shards = gallery.shards(own_ids)
    gallery_ids = np.concatenate(shards)
    if len(gallery_ids) == 0:
        raise ValueError("g_pids is empty.")
    positives = Positives(queries, gallery_ids)
    missing = positives.counts == 0
    _check_missing(missing, on_missing)

    offset = sum(len(shard) for shard in shards[: gallery.index])
    ranker = _BlockRanker(rows, gallery, positives, offset, len(own_ids), min(topk, len(gallery_ids)))
    with tqdm(total=len(queries), unit="query", disable=not progress or gallery.index > 0) as bar:
        blocks = _rank_all(ranker, len(queries), row_budget, bar.update)
    values = QueryMetrics(*(np.concatenate(parts) for parts in zip(*(block.values for block in blocks))))
    values = apply_missing(values, len(gallery_ids), on_missing)
    metrics, cmc = summarise(values, missing, max_rank)
    return RetrievalResult(
        metrics=metrics,
        cmc=torch.from_numpy(cmc.astype(np.float32)),
        ap=torch.from_numpy(values.ap),
        inp=torch.from_numpy(values.inp),
        first_rank=torch.from_numpy(values.first_rank),
        indices=torch.cat([block.indices for block in blocks]) if topk else None,
        scores=torch.cat([block.scores for block in blocks]) if topk else None,
        num_queries=len(queries),
        num_missing=int(missing.sum()),
    )


def _check_missing(missing: np.ndarray, on_missing: str) -> None:
    if missing.all():
        raise InputError(f"None of the {len(missing)} queries has a positive in the gallery: q_pids and g_pids differ.")
    if missing.any() and on_missing == "error":
        first = ", ".join(str(position) for position in np.flatnonzero(missing)[:5])
        raise InputError(
            f"{missing.sum()} of {len(missing)} queries have no positive in the gallery (first at positions {first}); "
            'choose on_missing="skip" or "miss" if that is intended.'
        )


def _rank_all(
    ranker: "_BlockRanker", num_queries: int, row_budget: int | None, done: Callable[[int], Any]
) -> list["_Block"]:
    """Rank block after block; where memory runs out, go on with blocks half as large."""
    blocks: list[_Block] = []
    # The scorer of this package says what its rows will be; of any other the first block tells.
    device = getattr(ranker.rows, "device", torch.device("cpu"))
    itemsize = getattr(ranker.rows, "dtype", torch.float64).itemsize
    size = ranker.agreed_size(row_budget, device, itemsize)
    told = ranker.all_know(hasattr(ranker.rows, "dtype"))
    largest = num_queries
    start = 0
    while start < num_queries:
        stop = min(start + size, num_queries)
        try:
            block = ranker.rank(start, stop)
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            block = None
        if block is None:  # outside the handler: the exception keeps the tensors of the failed block alive
            size = largest = (stop - start) // 2
            release_cached_memory()
            continue
        if not told:
            size, told = min(ranker.agreed_size(row_budget, block.device, block.itemsize), largest), True
        blocks.append(block)
        done(stop - start)
        start = stop
    return blocks


@dataclass(frozen=True)
class _Block:
    """Results of one range of queries, on CPU."""

    values: tuple[np.ndarray, np.ndarray, np.ndarray]
    indices: Tensor
    scores: Tensor
    device: torch.device
    itemsize: int


@dataclass(frozen=True)
class _BlockRanker:
    """Ranks a block of queries against the whole gallery, of which this process holds a part.

    Attributes:
        rows: scorer of this process's part.
        gallery: the processes that share the gallery.
        positives: global gallery positions of each query's positives.
        offset: global position of the first own column.
        columns: number of own columns.
        topk: best positions to return.
    """

    rows: Rows
    gallery: Gallery
    positives: Positives
    offset: int
    columns: int
    topk: int

    def agreed_size(self, row_budget: int | None, device: torch.device, itemsize: int) -> int:
        """Queries in one block, the same on all processes because every block ends in their exchange."""
        with settling(self.gallery):
            budget = default_row_budget(device) if row_budget is None else row_budget
            own = rows_within(budget, self.columns, itemsize)
        return -int(self.gallery.highest(np.array([-own]))[0])

    def all_know(self, known: bool) -> bool:
        """Whether `known` holds on every process: a decision that must not differ between them."""
        return not self.gallery.highest(np.array([int(not known)]))[0]

    def rank(self, start: int, stop: int) -> _Block:
        bounds, positions = self.positives.of_queries(start, stop)
        own = positions - self.offset
        with settling(self.gallery):
            block, itemsize = self._scores(start, stop)
            scores = read_scores(block, bounds, own)
            best = best_of_rows(block, self.topk)
        scores = self.gallery.highest(scores)
        with settling(self.gallery):
            ahead = count_ahead(block, bounds, own, scores)
        values = query_metrics(bounds, self.gallery.total(ahead) + 1)
        best_scores, indices = self._merge(*(part.cpu() for part in best))
        return _Block((values.ap, values.inp, values.first_rank), indices, best_scores, block.device, itemsize)

    def _scores(self, start: int, stop: int) -> tuple[Tensor, int]:
        """The block's scores, checked, contiguous and in float32 or float64; and the bytes of a score as delivered."""
        block = self.rows(start, stop)
        if not isinstance(block, Tensor) or not block.is_floating_point():
            raise TypeError(f"rows must return floating-point tensors, got {getattr(block, 'dtype', type(block))}.")
        if tuple(block.shape) != (stop - start, self.columns):
            raise ValueError(
                f"rows({start}, {stop}) must return shape {[stop - start, self.columns]}, got {list(block.shape)}."
            )
        itemsize = block.element_size()
        block = block.detach()
        block = (block if itemsize >= 4 else block.float()).contiguous()
        check_scores(block, start)
        return block, itemsize

    def _merge(self, scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Best positions of the whole gallery from the best of each part; parts come in gallery order."""
        if self.gallery.size == 1:
            return scores, columns
        columns = columns + self.offset
        padding = self.topk - columns.shape[1]
        own_scores = torch.nn.functional.pad(scores.double(), (0, padding), value=float("-inf")).numpy()
        own_columns = torch.nn.functional.pad(columns, (0, padding)).numpy()
        merged = torch.from_numpy(np.concatenate(self.gallery.shards(own_scores), axis=1))
        merged, order = torch.sort(merged, dim=1, descending=True, stable=True)
        joined = torch.from_numpy(np.concatenate(self.gallery.shards(own_columns), axis=1)).gather(1, order)
        return merged[:, : self.topk].to(scores.dtype), joined[:, : self.topk].contiguous()
