"""Metrics of a score matrix, with the signature of the IRRA family."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tbps_common.ranking.evaluate import evaluate_rows
from tbps_common.ranking.inputs import check_count, check_matrix, check_scores, identity_array

MatrixMetrics = tuple[Tensor, Tensor, Tensor, Tensor]


@overload
def rank(
    similarity: Tensor,
    q_pids: Any,
    g_pids: Any,
    max_rank: int = ...,
    get_mAP: Literal[True] = ...,
    *,
    full_indices: bool = ...,
) -> MatrixMetrics: ...


@overload
def rank(
    similarity: Tensor,
    q_pids: Any,
    g_pids: Any,
    max_rank: int = ...,
    *,
    get_mAP: Literal[False],
    full_indices: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def rank(
    similarity: Tensor,
    q_pids: Any,
    g_pids: Any,
    max_rank: int = ...,
    get_mAP: bool = ...,
    *,
    full_indices: bool = ...,
) -> MatrixMetrics | tuple[Tensor, Tensor]: ...


def rank(
    similarity: Tensor,
    q_pids: Any,
    g_pids: Any,
    max_rank: int = 10,
    get_mAP: bool = True,
    *,
    full_indices: bool = False,
) -> MatrixMetrics | tuple[Tensor, Tensor]:
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
