"""Scores of queries against a gallery, row block by row block."""

from collections.abc import Callable

import torch
from torch import Tensor

from tbps_common.ranking.gallery_blocks import gallery_blocks
from tbps_common.ranking.inputs import check_features
from tbps_common.ranking.precision import Precision, compute_dtype, operand, products
from tbps_common.ranking.reductions import reduction

Rows = Callable[[int, int], Tensor]


class ScoreRows:
    """Callable `rows(start, stop) -> [stop - start, G]` made by `score_rows`.

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
        self._reduction = reduction(reduce, k, query, gallery, self.dtype, as_is)

    def __call__(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.num_queries:
            raise IndexError(f"Queries {start} to {stop} are not within 0 to {self.num_queries}.")
        scores = torch.empty((stop - start, self.num_gallery), dtype=self.dtype, device=self.device)
        tiles = [
            slice(first, min(first + self._reduction.queries, stop))
            for first in range(start, stop, self._reduction.queries)
        ]
        with products(self._precision, self.device):
            # One tile of queries is arranged once; several are arranged anew for every gallery block, because keeping
            # them all would be a second copy of the query features.
            only = self._query_operand(tiles[0]) if len(tiles) == 1 else None
            for left, right, block in gallery_blocks(self._gallery, self._reduction.images, self.device):
                gallery = self._reduction.gallery_operand(operand(block, self.dtype, self._precision))
                for tile in tiles:
                    query = self._query_operand(tile) if only is None else only
                    rows = slice(tile.start - start, tile.stop - start)
                    self._reduction.score(query, gallery, scores[rows, left:right])
        return scores

    def _query_operand(self, tile: slice) -> Tensor:
        query = self._query[tile].to(self.device)
        return self._reduction.query_operand(operand(query, self.dtype, self._precision))


def score_rows(
    query_feats: Tensor,
    gallery_feats: Tensor,
    *,
    reduce: str = "dot",
    k: int = 6,
    device: torch.device | str | None = None,
    precision: Precision = "highest",
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

    Returns:
        `rows(start, stop) -> Tensor[stop - start, G]`.

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: an unknown `reduce` or `precision`, `k` < 1, shapes that do not fit, empty sets, NaN or infinity.
    """
    check_features(query_feats, gallery_feats, reduce, k)
    return unchecked_rows(query_feats, gallery_feats, reduce=reduce, k=k, device=device, precision=precision)


def unchecked_rows(
    query_feats: Tensor,
    gallery_feats: Tensor,
    *,
    reduce: str,
    k: int,
    device: torch.device | str | None,
    precision: Precision,
) -> ScoreRows:
    """`score_rows` for features that have been checked (or an empty shard of a gallery)."""
    place = gallery_feats.device if device is None else torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return ScoreRows(query_feats, gallery_feats, reduce, k, place, precision)


def similarity(query_feats: Tensor, gallery_feats: Tensor, *, reduce: str = "dot", k: int = 6) -> Tensor:
    """The whole score matrix `[Q, G]`, where the gallery is; see `score_rows` for the arguments and errors."""
    rows = score_rows(query_feats, gallery_feats, reduce=reduce, k=k)
    return rows(0, rows.num_queries)
