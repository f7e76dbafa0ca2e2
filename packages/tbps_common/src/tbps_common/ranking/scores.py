"""Scores of queries against a gallery, row block by row block."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tbps_common.ranking.compute import Precision, compute_dtype, operand, products
from tbps_common.ranking.inputs import check_count, check_features, check_scores
from tbps_common.ranking.reductions import EVEN_IMAGES, EVEN_QUERIES, reduction
from tbps_common.ranking.sharded import Shards

DEFAULT_ROW_BUDGET = 256 << 20

Rows = Callable[[int, int], Tensor]
"""`rows(start, stop) -> [stop - start, G]`: the scores of a range of queries."""


class ScoreRows:
    """Callable `rows(start, stop) -> [stop - start, G]` made by `score_rows`.

    Products are made of whole multiples of 16 queries and 48 images, the last of them filled up with repeated rows. The
    kernels that take care of the rest of other sizes round differently: equal pictures would get unequal scores, and the
    scores of a query would depend on how many are asked for at once.

    Attributes:
        device: where the scores lie.
        dtype: float32, or float64 for float64 features.
        num_queries: Q.
        num_gallery: G.
    """

    def __init__(
        self, query: Tensor, gallery: Tensor, reduce: str, k: int, device: torch.device, precision: Precision
    ) -> None:
        self.device = device
        self.dtype = compute_dtype(query.dtype, gallery.dtype, precision)
        self.num_queries, self.num_gallery = len(query), len(gallery)
        self._query, self._gallery = query.detach(), gallery.detach()
        self._precision = precision
        as_is = precision != "bfloat16" and all(
            features.device == device and features.dtype == self.dtype and features.stride(-1) == 1
            for features in (query, gallery)
        )
        self._reduction = reduction(reduce, k, query, gallery, self.dtype, device, as_is)

    def __call__(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.num_queries:
            raise IndexError(f"Queries {start} to {stop} are not within 0 to {self.num_queries}.")
        scores = torch.empty((stop - start, self.num_gallery), dtype=self.dtype, device=self.device)
        tiles = _tiles(start, stop, self._reduction.queries, EVEN_QUERIES)
        with products(self._precision, self.device):
            # Few tiles of queries are arranged once; many are arranged anew for every gallery block, because keeping
            # them all would be a second copy of the query features.
            kept = [self._query_operand(*tile) for tile in tiles] if len(tiles) <= 2 else None
            for left, right, block in _gallery_blocks(self._gallery, self._reduction.images, self.device):
                images = operand(_filled_up(block, EVEN_IMAGES), self.dtype, self._precision)
                images = self._reduction.gallery_operand(images)
                for number, (first, last) in enumerate(tiles):
                    queries = kept[number] if kept else self._query_operand(first, last)
                    part = scores[first - start : last - start, left:right]
                    if part.shape == (len(queries), len(images)):
                        self._reduction.score(queries, images, part)
                    else:
                        filled_up = part.new_empty(len(queries), len(images))
                        self._reduction.score(queries, images, filled_up)
                        part.copy_(filled_up[: last - first, : right - left])
        return scores

    def _query_operand(self, first: int, last: int) -> Tensor:
        queries = _filled_up(self._query[first:last].to(self.device), EVEN_QUERIES)
        return self._reduction.query_operand(operand(queries, self.dtype, self._precision))


def score_rows(
    query_feats: Tensor,
    gallery_feats: Tensor,
    *,
    reduce: str = "dot",
    k: int = 6,
    device: torch.device | str | None = None,
    precision: Precision = "highest",
    group: Any = None,
) -> ScoreRows:
    """Check the features once and return a callable that scores a range of queries against the whole gallery.

    Args:
        query_feats: `[Q, D]`, or `[Q, K, C]` for `attr_*`.
        gallery_feats: `[G, D]` (`dot`), `[G, T, D]` (`topk_mean`, `max`, `mean`, `logsumexp`) or `[G, K, C]`
            (`attr_avg`, `attr_max`, `attr_min`, `attr_lsp_max`, `attr_lsp_min`). May be a memory map: it is read in
            blocks and never copied whole.
        reduce: how a pair's inner products (token forms; not normalised here) or attribute cosines become its score.
        k: tokens averaged by `topk_mean`; all of them when `k` is at least T.
        device: where to score; by default where the gallery is.
        precision: `highest` (true float32 products), `tf32`, or `bfloat16` (operands rounded, float32 sums).
        group: a `torch.distributed` group whose processes each hold a shard of the gallery, which may then be empty;
            bad features of one of them are an error of all.

    Returns:
        `rows(start, stop) -> Tensor[stop - start, G]`, with the columns of this process's shard.

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: an unknown `reduce` or `precision`, `k` < 1, shapes that do not fit, empty sets, NaN or infinity.
    """
    with Shards(group).together():
        check_features(query_feats, gallery_feats, reduce, k, empty_gallery=group is not None)
        place = gallery_feats.device if device is None else torch.device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        return ScoreRows(query_feats, gallery_feats, reduce, k, place, precision)


def similarity(query_feats: Tensor, gallery_feats: Tensor, *, reduce: str = "dot", k: int = 6) -> Tensor:
    """The whole score matrix `[Q, G]`, where the gallery is; see `score_rows` for the arguments and errors."""
    rows = score_rows(query_feats, gallery_feats, reduce=reduce, k=k)
    return rows(0, rows.num_queries)


def _tiles(start: int, stop: int, size: int, even: int) -> list[tuple[int, int]]:
    """Bounds of tiles of `size` (a multiple of `even`), the last multiple of `even`, and what is left."""
    rest = stop - (stop - start) % even
    bounds = [*range(start, rest, size), rest, stop]
    return [(first, last) for first, last in zip(bounds, bounds[1:]) if first < last]


def _filled_up(features: Tensor, even: int) -> Tensor:
    """The rows, some repeated, so that their number is a multiple of `even`."""
    missing = -len(features) % even
    if missing == 0:
        return features
    return features[torch.arange(len(features) + missing, device=features.device) % len(features)]


def _gallery_blocks(gallery: Tensor, size: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(start, stop, block)` over the first dimension, each block on `device`.

    A block is valid until the next one is asked for. From host memory (also a memory map) to CUDA the blocks pass
    through two page-locked buffers on a copy stream of their own, the next one while this one is scored; on the
    gallery's own device they are views.
    """
    bounds = _tiles(0, len(gallery), size, EVEN_IMAGES)
    if device.type == "cuda" and gallery.device.type == "cpu" and bounds:
        yield from _through_pinned_buffers(gallery, bounds, device)
        return
    for start, stop in bounds:
        yield start, stop, gallery[start:stop].to(device)


def _through_pinned_buffers(
    gallery: Tensor, bounds: list[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    shape = (max(stop - start for start, stop in bounds), *gallery.shape[1:])
    compute, copy = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    pinned = [torch.empty(shape, dtype=gallery.dtype, pin_memory=True) for _ in range(2)]
    resident = [torch.empty(shape, dtype=gallery.dtype, device=device) for _ in range(2)]
    copied, used = [torch.cuda.Event() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]
    copy.wait_stream(compute)  # the memory of `resident` may still be read by work queued before

    def send(number: int) -> None:
        slot, (start, stop) = number % 2, bounds[number]
        copied[slot].synchronize()  # the previous transfer out of this page-locked buffer
        pinned[slot][: stop - start].copy_(gallery[start:stop])
        copy.wait_event(used[slot])
        with torch.cuda.stream(copy):
            resident[slot][: stop - start].copy_(pinned[slot][: stop - start], non_blocking=True)
            copied[slot].record(copy)

    send(0)
    for number, (start, stop) in enumerate(bounds):
        slot = number % 2
        compute.wait_event(copied[slot])
        yield start, stop, resident[slot][: stop - start]
        used[slot].record(compute)
        if number + 1 < len(bounds):
            send(number + 1)
    copy.synchronize()


def checked_rows(rows: Rows, start: int, stop: int, columns: int) -> Tensor:
    """The scores of a range of queries, contiguous and in float32 or float64."""
    block = rows(start, stop)
    if not isinstance(block, Tensor) or not block.is_floating_point():
        raise TypeError(f"rows must return floating-point tensors, got {getattr(block, 'dtype', type(block))}.")
    if tuple(block.shape) != (stop - start, columns):
        raise ValueError(f"rows({start}, {stop}) must return shape {[stop - start, columns]}, got {list(block.shape)}.")
    block = block.detach()
    block = (block if block.element_size() >= 4 else block.float()).contiguous()
    check_scores(block, start)
    return block


def block_size(rows: Rows, columns: int, row_budget: int | None) -> int:
    """How many rows of scores fit `row_budget` bytes; at least one.

    Args:
        rows: a scorer; its `dtype` and `device` count where it has them.
        columns: of a row.
        row_budget: by default 256 MiB in host memory, a quarter of what is free on a CUDA device.

    Raises:
        ValueError: `row_budget` is not positive.
    """
    device: torch.device = getattr(rows, "device", torch.device("cpu"))
    if row_budget is None:
        row_budget = max(1, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else DEFAULT_ROW_BUDGET
    itemsize = getattr(rows, "dtype", torch.float32).itemsize
    return max(1, check_count(row_budget, "row_budget", 1) // max(1, columns * itemsize))
