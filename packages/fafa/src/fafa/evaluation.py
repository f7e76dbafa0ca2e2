"""From features to the numbers of the paper: similarity, ranking, metrics.

Similarity is the mean of the k largest of the T cosines of a query vector with the tokens of a gallery image. Nothing here
holds Q x G x T values except `batchwise_similarity`, which exists for users of the released code. Features are ranked on
the device they are on, which is the model's.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fafa.data import GalleryDataset, QueryDataset
from fafa.features import CacheBudget, Extractor, StateCache
from fafa.model.fafa import FAFA
from fafa.options import TrainingFlags
from fafa.processors import BlipCaptionProcessor
from fafa.transforms import Transform
from tbps_common.datasets import ITCPR
from tbps_common.errors import InputError
from tbps_common.ranking import RetrievalResult, rank, retrieve, score_rows
from tbps_common.run.distributed import Ranks

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

COLUMNS = {"recall_at1": "R1", "recall_at5": "R5", "recall_at10": "R10", "mAP": "mAP"}
"""Name in the tables of a run -> name of the metric."""


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
        gfeats: `[G, T, D]`, unit; with several processes (`group`) the part that this one encoded.
        q_ids: integer instance ids `[Q]`.
        g_ids: integer instance ids `[G]` of `gfeats`; -1 answers no query.
        k: tokens that count.
        soft: False for the best token alone.
        topk: gallery positions returned for each query.
        max_rank: length of the CMC curve.
        **options: of `tbps_common.ranking.retrieve` (`group`, `precision`, `progress`, ...).

    Raises:
        InputError: `k` is below 1 or above T, or no query has a match.
    """
    if soft:
        _check_k(k, gfeats.shape[1])
    reduce = "topk_mean" if soft else "max"
    result = retrieve(
        qfeats, gfeats, q_ids, g_ids, reduce=reduce, k=k, topk=topk, max_rank=max_rank, on_missing="miss", **options
    )
    if result.num_missing:
        logger.warning(
            "%d of %d queries have no match in the gallery and count as never found.",
            result.num_missing,
            result.num_queries,
        )
    return result


def _check_k(k: int, tokens: int) -> None:
    if not 1 <= k <= tokens:
        raise InputError(f"--fda-k {k} must lie between 1 and the number of query tokens, {tokens}.")


def sweep(
    qfeats: Tensor, gfeats: Tensor, q_ids: Any, g_ids: Any, ks: Sequence[int], max_rank: int = 10
) -> dict[int, RetrievalResult]:
    """`retrieval` for several k in ascending order, without positions (`indices` is None)."""
    return {k: retrieval(qfeats, gfeats, q_ids, g_ids, k, topk=0, max_rank=max_rank) for k in sorted(set(ks))}


def itcpr_sets(itcpr: ITCPR, transform: Transform) -> tuple[QueryDataset, GalleryDataset]:
    """The queries and the gallery of an annotation."""
    query, gallery = itcpr.query, itcpr.gallery
    return (
        QueryDataset(query["instance_ids"], query["img_paths"], query["captions"], transform),
        GalleryDataset(gallery["instance_ids"], gallery["img_paths"], transform),
    )


def compute_itcpr_val_metrics(
    model: FAFA,
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
    if soft:
        _check_k(model.fda_k, model.num_query_token)
    extractor = Extractor(model, txt_processors["eval"], batch_size=batch_size, num_workers=num_workers)
    gallery = extractor.gallery(val_gallery_set)
    queries = extractor.queries(val_query_set, val_query_set.captions)
    ids = torch.as_tensor(val_query_set.instance_ids), torch.as_tensor(val_gallery_set.instance_ids)
    result = retrieval(queries, gallery, *ids, model.fda_k, soft, topk=0)
    print(result.table(task="com"))
    return tuple(result.metrics[name] for name in COLUMNS.values())  # type: ignore[return-value]


# The authors' spelling.
compute_ticpr_val_metrics = compute_itcpr_val_metrics


class Validator:
    """Measures a model in training. The outputs of a frozen ViT are computed once, as far as they fit `--eval-cache-gb`.

    With several processes each encodes a part of the gallery and ranks all queries against it; no process holds it whole.

    Args:
        model: it is put into evaluation mode for the length of a validation.
        itcpr: queries and gallery.
        transform: of the test images.
        args: the flags of the run.
        ranks: processes that share the work.
        stop_requested: asked between batches.
    """

    def __init__(
        self,
        model: FAFA,
        itcpr: ITCPR,
        transform: Transform,
        args: TrainingFlags,
        ranks: Ranks,
        stop_requested: Callable[[], bool],
    ):
        self.query_set, self.gallery_set = itcpr_sets(itcpr, transform)
        self._model, self._ranks = model, ranks
        self._extractor = Extractor(
            model,
            BlipCaptionProcessor(),
            args.eval_batch_size,
            args.eval_num_workers,
            ranks,
            stop_requested=stop_requested,
            progress=True,
        )
        limit = int(args.eval_cache_gb * 2**30) if model.settings.freeze_vit else 0
        budget = CacheBudget(limit, Path(args.eval_cache_dir) if args.eval_cache_dir else None)
        self._query_cache = StateCache(budget, f"query{ranks.rank}") if limit else None
        self._gallery_cache = StateCache(budget, f"gallery{ranks.rank}") if limit else None

    def measure(self) -> dict[str, float]:
        """Validate; every process must call it.

        Returns:
            `recall_at1`, `recall_at5`, `recall_at10`, `mAP` in percent, on every process.

        Raises:
            ExtractionStopped: the run was asked to stop meanwhile.
            DatasetError: an image cannot be read.
        """
        queries = self._extractor.queries(self.query_set, self.query_set.captions, self._query_cache)
        gallery = self._extractor.gallery(self.gallery_set, self._gallery_cache)
        q_ids, g_ids = torch.as_tensor(self.query_set.instance_ids), torch.as_tensor(self.gallery_set.instance_ids)
        own = self._extractor.own_part(len(g_ids))
        group = dist.group.WORLD if self._ranks.distributed else None
        result = retrieval(queries, gallery, q_ids, g_ids[own], self._model.fda_k, topk=0, group=group)
        logger.info("\n%s", result.table(task="com"))
        return {column: result.metrics[name] for column, name in COLUMNS.items()}

    def close(self) -> None:
        """Give the caches back."""
        for cache in (self._query_cache, self._gallery_cache):
            if cache is not None:
                cache.close()
