"""The k best columns of each row, equal scores in column order, without sorting the rows."""

import torch
from torch import Tensor

from tbps_common.ranking.inputs import check_count

# Working memory is bounded by handling this many scores at a time where whole rows are touched.
_SLICE_ELEMENTS = 1 << 21
_GPU_SLICE_ELEMENTS = 1 << 23
_CHUNK = 64
_DIRECT_COLUMNS = 1 << 14


def best_of_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first `k` columns of a stable descending sort of every row.

    Args:
        scores: `[B, G]` floating point without NaN; not changed.
        k: how many; all columns when it is G or more.

    Returns:
        Scores and int64 columns, both `[B, min(k, G)]`, on the device of `scores`.

    Raises:
        ValueError: negative `k`, or not a matrix.
    """
    check_count(k, "k", 0)
    if scores.dim() != 2:
        raise ValueError(f"scores must be [queries, gallery], got shape {list(scores.shape)}.")
    rows, columns = scores.shape
    k = min(k, columns)
    values = scores.new_empty((rows, k))
    indices = torch.empty((rows, k), dtype=torch.int64, device=scores.device)
    if k == 0 or rows == 0:
        return values, indices
    step = max(1, (_SLICE_ELEMENTS if scores.device.type == "cpu" else _GPU_SLICE_ELEMENTS) // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values[start:stop], indices[start:stop] = _best(scores[start:stop], k)
    return values, indices


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if scores.device.type != "cpu":
        # CUDA's selection compares bit patterns, which puts -0.0 behind +0.0; adding zero makes them one.
        scores = scores + 0.0
    columns = scores.shape[1]
    if k == columns:
        return torch.sort(scores, dim=1, descending=True, stable=True)
    if columns > _DIRECT_COLUMNS and (k + 1) * _CHUNK * 4 <= columns:
        values, indices = _largest_by_chunks(scores, k + 1)
    else:
        values, indices = torch.topk(scores, k + 1, dim=1)
    ambiguous = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    values, indices = values[:, :k], indices[:, :k]
    if len(ambiguous):
        # Which of the equal values at the border were taken is chance: take the leftmost.
        indices = indices.clone()
        indices[ambiguous] = _leftmost(scores[ambiguous], values[ambiguous, k - 1 : k], k)
    indices = indices.sort(dim=1).values
    values, order = torch.sort(scores.gather(1, indices), dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _leftmost(scores: Tensor, border: Tensor, k: int) -> Tensor:
    """Columns above `border [B, 1]`, filled up to `k` with the leftmost columns equal to it."""
    above, equal = scores > border, scores == border
    missing = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    taken = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(scores), k)


def _largest_by_chunks(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk(scores, count)` for long rows: only the chunks with the `count` largest maxima can hold them."""
    rows, columns = scores.shape
    whole = columns // _CHUNK * _CHUNK
    maxima = scores[:, :whole].unflatten(1, (-1, _CHUNK)).amax(dim=2)
    if whole < columns:
        maxima = torch.cat([maxima, scores[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    chunks = torch.topk(maxima, count, dim=1, sorted=False).indices
    candidates = (chunks.unsqueeze(2) * _CHUNK + torch.arange(_CHUNK, device=scores.device)).flatten(1)
    inside = candidates < columns
    held = scores.gather(1, candidates.clamp(max=columns - 1)).masked_fill_(~inside, float("-inf"))
    values, positions = torch.topk(held, count, dim=1)
    return values, candidates.gather(1, positions)
