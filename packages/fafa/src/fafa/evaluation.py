"""From features to the numbers of the paper: similarity, ranking, metrics, and the sweep over k.

Similarity is the mean of the k largest of the T cosines of a query vector with the tokens of a gallery image. Nothing here
holds Q x G x T values except `batchwise_similarity`, which exists for users of the released code.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tbps_common.errors import InputError
from tbps_common.ranking import RetrievalResult, evaluate_rows, rank, retrieve, score_rows
from tbps_common.ranking.inputs import identity_array
from tbps_common.ranking.metrics import QueryMetrics, apply_missing, summarise
from tbps_common.ranking.selection_network import selection_network

if TYPE_CHECKING:
    from fafa.model import Blip2FAFACPR

__all__ = [
    "batchwise_similarity",
    "compute_itcpr_val_metrics",
    "compute_ticpr_val_metrics",
    "rank",
    "retrieval",
    "sweep",
    "topk_mean_similarity",
]

logger = logging.getLogger("fafa.evaluation")

# Pairs sorted at once in a sweep: on a CPU the slabs of 32 tokens must stay in the core's cache.
_CPU_PAIRS, _GPU_PAIRS = 1 << 13, 1 << 21
_SWEEP_BYTES = 1 << 28


def batchwise_similarity(qfeats: Tensor, gfeats: Tensor, batch_size: int = 500) -> Tensor:
    """Cosine of every query with every token, `[Q, G, T]`; 5.8 GB for ITCPR, so prefer `topk_mean_similarity`.

    Args:
        qfeats: `[Q, D]`.
        gfeats: `[G, T, D]`.
        batch_size: queries handled at once.
    """
    groups, tokens, width = gfeats.shape
    flat = gfeats.reshape(groups * tokens, width).t()
    result = qfeats.new_empty(len(qfeats), groups, tokens)
    for start in range(0, len(qfeats), batch_size):
        block = qfeats[start : start + batch_size]
        torch.mm(block, flat, out=result[start : start + batch_size].view(len(block), -1))
    return result


def topk_mean_similarity(qfeats: Tensor, gfeats: Tensor, k: int, chunk_size: int = 1024) -> Tensor:
    """Similarity `[Q, G]`: mean of the `k` largest over the tokens.

    Args:
        qfeats: `[Q, D]`.
        gfeats: `[G, T, D]`.
        k: 1 gives the maximum, T and more the mean.
        chunk_size: queries handled at once; the result does not depend on it.

    Raises:
        ValueError: `k` below 1, shapes that do not fit, NaN or infinity.
    """
    rows = score_rows(qfeats, gfeats, reduce="topk_mean", k=k)
    starts = range(0, len(qfeats), max(1, chunk_size))
    return torch.cat([rows(start, min(start + max(1, chunk_size), len(qfeats))) for start in starts])


def retrieval(
    qfeats: Tensor,
    gfeats: Tensor,
    q_ids: Any,
    g_ids: Any,
    k: int,
    soft: bool = True,
    topk: int = 10,
    max_rank: int = 10,
    **options: Any,
) -> RetrievalResult:
    """Metrics and best gallery positions of one evaluation.

    A query without a match counts AP 0 and INP 0; how many there are is logged once.

    Args:
        qfeats: `[Q, D]`, unit.
        gfeats: `[G, T, D]`, unit.
        q_ids: integer instance ids `[Q]`.
        g_ids: integer instance ids `[G]`; -1 answers no query.
        k: tokens that count.
        soft: False for the best token alone.
        topk: gallery positions returned for each query.
        max_rank: length of the CMC curve.
        **options: of `tbps_common.ranking.retrieve` (`device`, `precision`, `progress`, ...).

    Raises:
        InputError: `k` is below 1 or above T, or no query has a match.
    """
    if soft:
        _check_k(k, gfeats.shape[1])
    reduce = "topk_mean" if soft else "max"
    result = retrieve(
        qfeats, gfeats, q_ids, g_ids, reduce=reduce, k=k, topk=topk, max_rank=max_rank, on_missing="miss", **options
    )
    _report_missing(result.num_missing, result.num_queries)
    return result


def sweep(
    qfeats: Tensor, gfeats: Tensor, q_ids: Any, g_ids: Any, ks: Sequence[int], max_rank: int = 10
) -> dict[int, RetrievalResult]:
    """Metrics for several k from one pass over the similarities: tokens are sorted once, their means are running sums.

    Args:
        qfeats: `[Q, D]`, unit.
        gfeats: `[G, T, D]`, unit.
        q_ids: integer instance ids `[Q]`.
        g_ids: integer instance ids `[G]`.
        ks: numbers of tokens.
        max_rank: length of the CMC curves.

    Returns:
        Result of each k, in ascending order; without positions (`indices` is None).

    Raises:
        InputError: a k is below 1 or above T, or no query has a match.
    """
    queries, gallery = identity_array(q_ids, "q_ids"), identity_array(g_ids, "g_ids")
    if len(queries) != len(qfeats) or len(gallery) != len(gfeats):
        raise ValueError(
            f"{len(qfeats)} queries and {len(gfeats)} images, but {len(queries)} and {len(gallery)} identities."
        )
    wanted = sorted(set(ks))
    for k in wanted:
        _check_k(k, gfeats.shape[1])
    found = np.isin(queries, gallery)
    if not wanted or not found.any():
        raise InputError("A sweep needs at least one k, and a query whose instance id is in the gallery.")
    _report_missing(int((~found).sum()), len(queries))
    places = np.flatnonzero(found)
    size = max(1, _SWEEP_BYTES // (4 * len(wanted) * len(gallery)))
    values = {k: np.full((3, len(queries)), np.nan) for k in wanted}
    for start in range(0, len(places), size):
        block = places[start : start + size]
        means = topk_means(qfeats[torch.from_numpy(block).to(qfeats.device)], gfeats, wanted)
        for k, scores in zip(wanted, means):
            result = evaluate_rows(lambda a, b, rows=scores: rows[a:b], queries[block], gallery, topk=0)
            values[k][:, block] = np.stack([result.ap.numpy(), result.inp.numpy(), result.first_rank.numpy()])
    return {k: _result(values[k], ~found, len(gallery), max_rank) for k in wanted}


def _result(values: np.ndarray, missing: np.ndarray, num_gallery: int, max_rank: int) -> RetrievalResult:
    first_rank = np.where(missing, 0, values[2]).astype(np.int64)
    counted = apply_missing(QueryMetrics(values[0], values[1], first_rank), num_gallery, "miss")
    metrics, cmc = summarise(counted, missing, max_rank)
    return RetrievalResult(
        metrics=metrics,
        cmc=torch.from_numpy(cmc.astype(np.float32)),
        ap=torch.from_numpy(counted.ap),
        inp=torch.from_numpy(counted.inp),
        first_rank=torch.from_numpy(counted.first_rank),
        indices=None,
        scores=None,
        num_queries=len(missing),
        num_missing=int(missing.sum()),
    )


def topk_means(qfeats: Tensor, gfeats: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Means of the k largest token similarities for several k, `[Q, G]` each.

    Every token is one contiguous row of scratch; a sorting network of element-wise maxima and minima orders all pairs
    together, and the running sum over its rows gives the mean for every k.

    Args:
        qfeats: `[Q, D]`.
        gfeats: `[G, T, D]`.
        ks: ascending, each between 1 and T.
    """
    groups, tokens, width = gfeats.shape
    network = selection_network(tokens, tokens)
    comparators = [(i, j) for i, j, _ in network.sort]
    means = [qfeats.new_empty(len(qfeats), groups) for _ in ks]
    pairs = _CPU_PAIRS if qfeats.device.type == "cpu" else _GPU_PAIRS
    step = max(1, pairs // len(qfeats))
    scratch = qfeats.new_empty(network.width + 1, min(step, groups) * len(qfeats))
    for start in range(0, groups, step):
        images = gfeats[start : start + step].to(qfeats)
        count = len(images) * len(qfeats)
        rows = scratch[:, :count] if count == scratch.shape[1] else qfeats.new_empty(len(scratch), count)
        rows[tokens:] = float("-inf")
        tokens_first = images.transpose(0, 1).reshape(-1, width)
        torch.mm(tokens_first, qfeats.t(), out=rows[:tokens].view(-1, len(qfeats)))
        running = _sorted_rows(rows, comparators)
        total = torch.zeros_like(rows[0])
        taken = 0
        for k, mean in zip(ks, means):
            for row in running[taken:k]:
                total += row
            taken = k
            mean[:, start : start + step] = (total / k).view(len(images), -1).t()
    return means


def _sorted_rows(rows: Tensor, comparators: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Rows in descending order, element by element; the last row is spare room."""
    wires: list[Any] = list(rows[:-1])
    spare: Any = rows[-1]
    on_cpu = rows.device.type == "cpu"
    if on_cpu:  # numpy: half the cost of a call of the torch functions
        wires, spare = [wire.numpy() for wire in wires], spare.numpy()
    maximum, minimum = (np.maximum, np.minimum) if on_cpu else (torch.maximum, torch.minimum)
    for i, j in comparators:
        maximum(wires[i], wires[j], out=spare)
        minimum(wires[i], wires[j], out=wires[j])
        wires[i], spare = spare, wires[i]
    return [torch.from_numpy(wire) for wire in wires] if on_cpu else wires


def _check_k(k: int, tokens: int) -> None:
    if not 1 <= k <= tokens:
        raise InputError(f"--fda-k {k} must lie between 1 and the number of query tokens, {tokens}.")


def _report_missing(missing: int, queries: int) -> None:
    if missing:
        logger.warning("%d of %d queries have no match in the gallery and count as never found.", missing, queries)


def compute_itcpr_val_metrics(
    model: "Blip2FAFACPR",
    val_query_set: Any,
    val_gallery_set: Any,
    txt_processors: Mapping[str, Any],
    soft: bool = False,
    batch_size: int = 64,
    num_workers: int = 2,
) -> tuple[float, float, float, float]:
    """Evaluate on ITCPR, print the table, and return (R@1, R@5, R@10, mAP) in percent.

    Args:
        model: gives the features and `fda_k`; its mode is left as it was.
        val_query_set: `fafa.data.QueryDataset`.
        val_gallery_set: `fafa.data.GalleryDataset`.
        txt_processors: its entry `eval` cleans the captions.
        soft: mean of the `fda_k` best tokens; False: the best token.
        batch_size: images encoded at once.
        num_workers: processes that load images.

    Raises:
        InputError: an image cannot be read, `fda_k` exceeds the query tokens, or no query has a match.
    """
    from fafa.extraction import Extractor

    if soft:
        _check_k(model.fda_k, model.num_query_token)
    extractor = Extractor(
        model, model.device, clean=txt_processors["eval"], batch_size=batch_size, num_workers=num_workers
    )
    gallery = extractor.gallery(val_gallery_set)
    queries = extractor.queries(val_query_set, val_query_set.captions)
    result = retrieval(
        queries, gallery, val_query_set.instance_ids, val_gallery_set.instance_ids, model.fda_k, soft, topk=0
    )
    print(result.table(task="com"))
    return tuple(result.metrics[name] for name in ("R1", "R5", "R10", "mAP"))  # type: ignore[return-value]


# The authors' spelling.
compute_ticpr_val_metrics = compute_itcpr_val_metrics
