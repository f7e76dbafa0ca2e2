"""Two-stage re-ranking of MRA: matching (ITM) scores of the best candidates, fused with the first-stage scores.

With S the first-stage scores and z the matching logits of each query's candidates:

1. Z holds z at the candidates; every other column of a row holds the row's smallest z.
2. Zn = (Z - min Z) / (max Z - min Z), over the whole matrix; likewise Sn from S. A constant matrix becomes 0.
3. With mirrored images step 1 and 2 are done for their logits too, and Zn is the mean of both.
4. F = Zn + weight * Sn.

The released code on W processes gives another result: each process normalises a matrix in which the rows of the other
processes hold the marker 1000, and the matrices are added up. Rows of process r then become
(Z - m_r) / (1000 - m_r) + weight * W * Sn (and a constant, left out here because it cannot change a ranking), with m_r the
smallest logit of that process, which owns floor(Q / W) + 1 consecutive queries. `legacy_world_size=W` reproduces that.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbps_common.ranking.inputs import check_count, check_matrix
from tbps_common.ranking.scores import Rows, block_size, checked_rows
from tbps_common.ranking.sharded import Shards

_LEGACY_MARKER = 1000.0


def rerank(
    sims: Tensor,
    topk_index: Tensor,
    itm: Tensor,
    *,
    itm_flip: Tensor | None = None,
    weight: float = 0.002,
    legacy_world_size: int = 1,
) -> Tensor:
    """Fused scores of all pairs.

    Args:
        sims: `[Q, G]` first-stage scores; not changed.
        topk_index: `[Q, k]` gallery positions of each query's candidates, all different within a row.
        itm: `[Q, k]` their matching logits.
        itm_flip: `[Q, k]` the logits with mirrored images.
        weight: of the normalised first-stage scores.
        legacy_world_size: number of processes whose released result is wanted; 1 is the paper's formula.

    Returns:
        `[Q, G]`, float32 (float64 for float64 scores), on the device of `sims`.

    Raises:
        TypeError: scores that are not floating point, positions that are not integers.
        ValueError: shapes that do not fit, positions outside the gallery or repeated, NaN or infinity.
    """
    check_matrix(sims)
    if isinstance(topk_index, Tensor) and topk_index.dim() == 2 and len(topk_index) != len(sims):
        raise ValueError(f"sims has {len(sims)} rows but topk_index has {len(topk_index)}.")
    fused = rerank_rows(
        lambda start, stop: sims[start:stop],
        sims.shape[1],
        topk_index,
        itm,
        itm_flip=itm_flip,
        weight=weight,
        legacy_world_size=legacy_world_size,
        row_budget=sims.numel() * sims.element_size(),
    )
    return fused(0, len(sims))


def rerank_rows(
    rows: Rows,
    num_gallery: int,
    topk_index: Tensor,
    itm: Tensor,
    *,
    itm_flip: Tensor | None = None,
    weight: float = 0.002,
    legacy_world_size: int = 1,
    row_budget: int | None = None,
    group: Any = None,
) -> Rows:
    """The same as a callable for `evaluate_rows`, for galleries whose score matrix is too large to hold.

    `rows` is run through once here, for the range of the first-stage scores, and again when the result is asked for.

    Args:
        rows: `rows(start, stop) -> [stop - start, G]` first-stage scores, for example from `score_rows`.
        num_gallery: G.
        topk_index: as for `rerank`.
        itm: as for `rerank`.
        itm_flip: as for `rerank`.
        weight: as for `rerank`.
        legacy_world_size: as for `rerank`.
        row_budget: bytes for one block of rows of the first pass; by default as in `evaluate_rows`.
        group: a `torch.distributed` group whose processes each hold a shard of the gallery: `rows` and `num_gallery` are
            those of the own shard, candidates and logits are all, as positions in the shards joined in rank order.

    Returns:
        `fused(start, stop) -> [stop - start, G]`.

    Raises:
        TypeError: as `rerank`.
        ValueError: as `rerank`, or rows of a wrong shape.
    """
    shards = Shards(group)
    with shards.together():
        check_count(num_gallery, "num_gallery", 1 if group is None else 0)
        world = check_count(legacy_world_size, "legacy_world_size", 1)
    sizes = [int(size[0]) for size in shards.gather(np.array([num_gallery]))]
    with shards.together():
        candidates = _check_candidates(topk_index, sum(sizes))
        logits = [_check_logits(itm, "itm", candidates)]
        if itm_flip is not None:
            logits.append(_check_logits(itm_flip, "itm_flip", candidates))
        matching, fill = (torch.stack(both).mean(dim=0) for both in zip(*(_normalised(z, world) for z in logits)))
        lowest, highest = _range(rows, len(candidates), num_gallery, row_budget)
    low, high = (float(value) for value in shards.highest(np.array([-lowest, highest])) * (-1, 1))
    scale = float(weight) * world / (high - low) if high > low else 0.0
    candidates = candidates - sum(sizes[: shards.index])  # those of other shards lie outside the own columns

    def fused(start: int, stop: int) -> Tensor:
        block = rows(start, stop).detach()
        scores = block.to(torch.float64 if block.dtype == torch.float64 else torch.float32, copy=True)
        scores.sub_(low).mul_(scale)
        columns, own_matching, own_fill = (part[start:stop].to(scores.device) for part in (candidates, matching, fill))
        row, slot = ((columns >= 0) & (columns < num_gallery)).nonzero(as_tuple=True)
        column = columns[row, slot]
        judged = scores[row, column] + own_matching.to(scores.dtype)[row, slot]
        scores += own_fill.to(scores.dtype)
        scores[row, column] = judged
        return scores

    return fused


def _range(rows: Rows, num_queries: int, num_gallery: int, row_budget: int | None) -> tuple[float, float]:
    """The smallest and the largest first-stage score of this process."""
    low, high = float("inf"), float("-inf")
    size = block_size(rows, num_gallery, row_budget)
    for start in range(0, num_queries, size) if num_gallery else ():
        block = checked_rows(rows, start, min(start + size, num_queries), num_gallery)
        lowest, highest = torch.aminmax(block)
        low, high = min(low, lowest.item()), max(high, highest.item())
        del block
    return low, high


def _check_logits(logits: Any, name: str, candidates: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits))}.")
    if logits.shape != candidates.shape:
        raise ValueError(
            f"{name} must have the shape of topk_index, {list(candidates.shape)}, got {list(logits.shape)}."
        )
    logits = logits.detach().to(candidates.device, torch.float64)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{name} holds NaN or infinity.")
    return logits


def _check_candidates(topk_index: Any, num_gallery: int) -> Tensor:
    if not isinstance(topk_index, Tensor) or topk_index.is_floating_point() or topk_index.dtype == torch.bool:
        raise TypeError(f"topk_index must be an integer tensor, got {getattr(topk_index, 'dtype', type(topk_index))}.")
    if topk_index.dim() != 2 or topk_index.numel() == 0:
        raise ValueError(f"topk_index must be [queries, k] and not empty, got shape {list(topk_index.shape)}.")
    candidates = topk_index.long()
    low, high = torch.aminmax(candidates)
    if low < 0 or high >= num_gallery:
        raise ValueError(
            f"topk_index must lie within the {num_gallery} gallery positions, got {int(low)} to {int(high)}."
        )
    ordered = candidates.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("topk_index names a gallery position twice for one query.")
    return candidates


def _normalised(logits: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Normalised logits `[Q, k]` and normalised row fill `[Q, 1]`.

    The fill is the smallest logit of its row, so the range over the whole matrix is the range of the logits.
    """
    fill = logits.amin(dim=1, keepdim=True)
    if world == 1:
        low, high = torch.aminmax(logits)
        scale = torch.where(high > low, 1 / (high - low), 0.0)
        return (logits - low) * scale, (fill - low) * scale
    step = len(logits) // world + 1
    low = torch.cat([part.amin().expand(len(part), 1) for part in fill.split(step)])
    scale = 1 / (_LEGACY_MARKER - low)
    return (logits - low) * scale, (fill - low) * scale
