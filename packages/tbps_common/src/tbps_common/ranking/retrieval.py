"""From features to metrics."""

from typing import Any

import torch
from torch import Tensor

from tbps_common.ranking.evaluate import evaluate_rows
from tbps_common.ranking.inputs import check_features, identity_array
from tbps_common.ranking.precision import Precision
from tbps_common.ranking.result import RetrievalResult
from tbps_common.ranking.scores import unchecked_rows
from tbps_common.ranking.sharded import open_gallery, settling


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
    gallery = open_gallery(group)
    with settling(gallery):
        check_features(query_feats, gallery_feats, reduce, k, empty_gallery=group is not None)
        for name, features, pids in (("query", query_feats, q_pids), ("gallery", gallery_feats, g_pids)):
            given = len(identity_array(pids, f"{name[0]}_pids"))
            if given != len(features):
                raise ValueError(f"{name}_feats has {len(features)} rows but {name[0]}_pids has {given} identities.")
        rows = unchecked_rows(query_feats, gallery_feats, reduce=reduce, k=k, device=device, precision=precision)
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
