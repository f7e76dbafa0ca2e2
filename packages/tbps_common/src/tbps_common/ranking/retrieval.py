"""From features, a score matrix or rows of scores to metrics: `retrieve`, `rank` and `evaluate_rows`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prettytable import PrettyTable
from torch import Tensor
from tqdm import tqdm

from tbps_common.errors import InputError
from tbps_common.ranking.compute import Precision
from tbps_common.ranking.inputs import (
    ON_MISSING,
    check_choice,
    check_count,
    check_matrix,
    check_scores,
    identity_array,
)
from tbps_common.ranking.memory import is_out_of_memory, release_cached_memory
from tbps_common.ranking.metrics import (
    Positives,
    QueryMetrics,
    count_ahead,
    query_metrics,
    read_scores,
    summarise,
)
from tbps_common.ranking.scores import Rows, block_size, checked_rows, score_rows
from tbps_common.ranking.sharded import Shards
from tbps_common.ranking.topk import best_of_rows


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Metrics of one retrieval direction, and the best gallery positions of each query. All tensors on CPU.

    Attributes:
        metrics: `R1`, `R5`, `R10`, `mAP`, `mINP` in percent; `mFR`, the 0-based mean rank of the first positive.
        cmc: float32 `[max_rank]`, percent.
        ap: float64 `[Q]`, fractions; NaN for a query without positive (0 under `on_missing="miss"`).
        inp: float64 `[Q]`, likewise.
        first_rank: int64 `[Q]`, 1-based; 0 for a query without positive (G + 1 under `miss`).
        indices: int64 `[Q, min(topk, G)]`, best gallery positions; `None` with `topk=0`.
        scores: their scores.
        num_queries: Q.
        num_missing: queries without a positive.
    """

    metrics: dict[str, float]
    cmc: Tensor
    ap: Tensor
    inp: Tensor
    first_rank: Tensor
    indices: Tensor | None
    scores: Tensor | None
    num_queries: int
    num_missing: int

    def __str__(self) -> str:
        percent = "  ".join(f"{name} {self.metrics[name]:.2f}" for name in ("R1", "R5", "R10", "mAP", "mINP"))
        missing = f", {self.num_missing} without a positive" if self.num_missing else ""
        return f"{percent}  mFR {self.metrics['mFR']:.2f}  ({self.num_queries} queries{missing})"

    def table(
        self,
        task: str = "t2i",
        columns: Sequence[str] = ("R1", "R5", "R10", "mAP", "mINP"),
        decimals: int = 3,
    ) -> PrettyTable:
        """The table the papers' code prints; further rows (`[task, *values]`) can be added to it.

        Args:
            task: entry of the first column.
            columns: names out of `metrics`.
            decimals: places shown.

        Raises:
            ValueError: a column that is not a metric.
        """
        unknown = [name for name in columns if name not in self.metrics]
        if unknown:
            raise ValueError(f"columns must be among {', '.join(self.metrics)}, got {', '.join(unknown)}.")
        table = PrettyTable(["task", *columns])
        table.align["task"] = "r"  # as the papers' logs have it: `|  t2i | 73.379 |`
        for name in columns:
            table.custom_format[name] = lambda _, value: f"{value:.{decimals}f}"
        table.add_row([task, *(self.metrics[name] for name in columns)])
        return table


def retrieve(
    query_feats: Tensor,
    gallery_feats: Tensor,
    q_pids: Any,
    g_pids: Any,
    *,
    reduce: str = "dot",
    k: int = 6,
    topk: int = 10,
    max_rank: int = 10,
    on_missing: str = "error",
    row_budget: int | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "highest",
    group: Any = None,
    progress: bool = False,
) -> RetrievalResult:
    """Score queries against a gallery and compute every metric, without holding all scores.

    Beyond the features this takes `row_budget` and some tens of megabytes, however many queries, images and tokens
    there are.

    Args:
        query_feats: `[Q, D]`, or `[Q, K, C]` for `attr_*` reductions.
        gallery_feats: `[G, D]`, `[G, T, D]` or `[G, K, C]`; see `score_rows` for the reductions. May be a memory map.
        q_pids: integer identities `[Q]`.
        g_pids: integer identities `[G]`.
        reduce: how the score of a pair comes from its features; nothing is normalised except by `attr_*`.
        k: tokens averaged by `topk_mean`.
        topk: best gallery positions to return for each query.
        max_rank: length of the CMC curve.
        on_missing: queries without a positive: `error`, `skip` or `miss`.
        row_budget: bytes for one block of rows; by default 256 MiB on CPU, a quarter of the free memory on CUDA.
        device: where to score; by default where the gallery features are.
        precision: `highest` (true float32 products; half features are raised, float64 stays), `tf32` or `bfloat16`.
        group: a `torch.distributed` group; every process gives all queries and its own shard of the gallery.
        progress: show a bar over queries on stderr (first process only).

    Returns:
        The result; the same on every process of `group`.

    Raises:
        TypeError: features that are not floating-point tensors, identities that are not integers.
        ValueError: features that do not fit each other or their identities, NaN or infinity, a bad option, queries
            without a positive.
    """
    rows = score_rows(query_feats, gallery_feats, reduce=reduce, k=k, device=device, precision=precision, group=group)
    with Shards(group).together():
        for name, features, pids in (("query", query_feats, q_pids), ("gallery", gallery_feats, g_pids)):
            given = len(identity_array(pids, f"{name[0]}_pids"))
            if given != len(features):
                raise ValueError(f"{name}_feats has {len(features)} rows but {name[0]}_pids has {given} identities.")
    return evaluate_rows(
        rows,
        q_pids,
        g_pids,
        topk=topk,
        max_rank=max_rank,
        on_missing=on_missing,
        row_budget=row_budget,
        group=group,
        progress=progress,
    )


def rank(
    similarity: Tensor,
    q_pids: Any,
    g_pids: Any,
    max_rank: int = 10,
    get_mAP: bool = True,
    *,
    full_indices: bool = False,
) -> tuple[Tensor, ...]:
    """CMC, mAP and mINP of a score matrix; equal scores keep the order of the gallery.

    For the other direction pass the transposed matrix: `rank(similarity.t(), g_pids, q_pids)`.

    Args:
        similarity: `[Q, G]` floating point, on any device; not changed.
        q_pids: integer identities `[Q]`.
        g_pids: integer identities `[G]`.
        max_rank: length of `cmc`, and columns of `indices`.
        get_mAP: also return mAP and mINP. A query without a positive is then an error; otherwise it is a miss.
        full_indices: return the order of the whole gallery, `[Q, G]`, as the family's code does.

    Returns:
        `(cmc, mAP, mINP, indices)`, or `(cmc, indices)` without `get_mAP`: float32 percentages `[max_rank]` and scalars,
        int64 `[Q, min(max_rank, G)]`, all on CPU.

    Raises:
        TypeError: scores that are not a floating-point tensor, identities that are not integers.
        ValueError: shapes that do not fit, NaN or infinity, queries without a positive.
    """
    check_matrix(similarity)
    check_count(max_rank, "max_rank", 1)
    for axis, (name, pids) in enumerate((("q_pids", q_pids), ("g_pids", g_pids))):
        given = len(identity_array(pids, name))
        if given != similarity.shape[axis]:
            raise ValueError(f"similarity has shape {list(similarity.shape)} but {name} has {given} identities.")
    check_scores(similarity, 0)
    result = evaluate_rows(
        lambda start, stop: similarity[start:stop],
        q_pids,
        g_pids,
        topk=similarity.shape[1] if full_indices else max_rank,
        max_rank=max_rank,
        on_missing="error" if get_mAP else "miss",
    )
    assert result.indices is not None
    if not get_mAP:
        return result.cmc, result.indices
    mean_ap, mean_inp = (torch.tensor(result.metrics[name], dtype=torch.float32) for name in ("mAP", "mINP"))
    return result.cmc, mean_ap, mean_inp, result.indices


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
            once for each block, in increasing order; a block that does not fit memory is asked for again in halves. Of
            its attributes `dtype` and `device`, where it has them, follows how many rows a block has.
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
    shards = Shards(group)
    with shards.together():
        queries, own_ids = identity_array(q_pids, "q_pids"), identity_array(g_pids, "g_pids")
        check_count(topk, "topk", 0)
        check_count(max_rank, "max_rank", 1)
        check_choice(on_missing, "on_missing", ON_MISSING)
        own_size = block_size(rows, len(own_ids), row_budget)
        if len(queries) == 0:
            raise ValueError("q_pids is empty.")
    query_digest = hashlib.blake2b(queries.tobytes(), digest_size=16).hexdigest()
    shards.require_same({"q_pids": query_digest, "topk": topk, "max_rank": max_rank, "on_missing": on_missing})
    ids_of_shards = shards.gather(own_ids)
    gallery_ids = np.concatenate(ids_of_shards)
    if len(gallery_ids) == 0:
        raise ValueError("g_pids is empty.")
    positives = Positives(queries, gallery_ids)
    missing = positives.counts == 0
    _check_missing(missing, on_missing)

    offset = sum(len(ids) for ids in ids_of_shards[: shards.index])
    own = range(offset, offset + len(own_ids))
    absent = (0.0, len(gallery_ids) + 1) if on_missing == "miss" else (float("nan"), 0)
    # Every block ends in an exchange, so all processes take blocks of the same size.
    size = -int(shards.highest(np.array([-own_size]))[0])
    blocks: list[tuple[QueryMetrics, Tensor, Tensor]] = []
    start = 0
    with tqdm(total=len(queries), unit="query", disable=not progress or shards.index > 0) as bar:
        while start < len(queries):
            stop = min(start + size, len(queries))
            try:
                block = _ranked(rows, shards, positives, own, min(topk, len(gallery_ids)), start, stop)
            except Exception as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
                block = None
            if block is None:  # outside the handler: the exception keeps the tensors of the failed block alive
                size = (stop - start) // 2
                release_cached_memory()
                continue
            ranks, best, best_scores = block
            blocks.append((query_metrics(positives.counts[start:stop], ranks, *absent), best, best_scores))
            bar.update(stop - start)
            start = stop
    of_blocks, indices, scores = zip(*blocks)
    values = QueryMetrics(*(np.concatenate(parts) for parts in zip(*of_blocks)))
    metrics, cmc = summarise(values, missing, max_rank)
    return RetrievalResult(
        metrics=metrics,
        cmc=torch.from_numpy(cmc.astype(np.float32)),
        ap=torch.from_numpy(values.ap),
        inp=torch.from_numpy(values.inp),
        first_rank=torch.from_numpy(values.first_rank),
        indices=torch.cat(indices) if topk else None,
        scores=torch.cat(scores) if topk else None,
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


def _ranked(
    rows: Rows, shards: Shards, positives: Positives, own: range, topk: int, start: int, stop: int
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Ranks of the positives, best positions and their scores; `own` are the gallery positions `rows` scores."""
    bounds, positions = positives.of_queries(start, stop)
    columns = positions - own.start
    with shards.together():
        block = checked_rows(rows, start, stop, len(own))
        scores = read_scores(block, bounds, columns)
        best_scores, best = (part.cpu() for part in best_of_rows(block, topk))
        best = best + own.start
    scores = shards.highest(scores)
    with shards.together():
        ahead = count_ahead(block, bounds, columns, scores)
    ranks = shards.total(ahead) + 1
    if shards.count > 1:
        # The best of the whole gallery are among the best of each part; the parts come in gallery order.
        padding = (0, topk - best.shape[1])
        padded = torch.nn.functional.pad(best_scores.double(), padding, value=float("-inf")).numpy()
        merged = torch.from_numpy(np.concatenate(shards.gather(padded), axis=1))
        merged, order = torch.sort(merged, dim=1, descending=True, stable=True)
        everywhere = shards.gather(torch.nn.functional.pad(best, padding).numpy())
        best = torch.from_numpy(np.concatenate(everywhere, axis=1)).gather(1, order)[:, :topk].contiguous()
        best_scores = merged[:, :topk].to(best_scores.dtype)
    return ranks, best, best_scores
