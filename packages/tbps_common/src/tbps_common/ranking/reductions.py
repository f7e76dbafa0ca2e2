"""How the score of a pair comes from its features: one class for each kind of reduction.

A reduction works on tiles. `gallery_operand` and `query_operand` arrange the features of a tile once, `score` fills the
scores of one query tile against one gallery tile. `images` and `queries` bound a tile so that everything allocated
besides the scores stays within some tens of megabytes, whatever the sizes of the data.
"""

import numpy as np
import torch
from torch import Tensor

from tbps_common.ranking.compute import run_all
from tbps_common.ranking.selection_network import selection_network

TILE_BYTES = 1 << 24
NORM_FLOOR = 1e-8

# Tiles are multiples of these, so that a product has no rest (see `scores.ScoreRows`). Measured with MKL on AVX-512: the
# float32 kernels of these multiples give a pair the same score in any product, on any number of threads; 48 images serve
# float64 too.
EVEN_QUERIES, EVEN_IMAGES = 16, 48

# One piece of a token reduction on CPU: the slabs must stay in the core's cache, yet be long enough for the cost of a
# call to vanish (16k pairs of 32 tokens take 2.4 MB). A GPU wants the longest slabs the memory bound allows.
_CPU_PAIRS, _CPU_SCRATCH_BYTES, _CPU_OPERAND_BYTES = 1 << 14, 5 << 19, 1 << 22
_GPU_SCRATCH_BYTES = 3 << 24


def reduction(
    reduce: str, k: int, query: Tensor, gallery: Tensor, dtype: torch.dtype, device: torch.device, as_is: bool
) -> "InnerProduct":
    """The reduction named `reduce` for features of these shapes.

    Args:
        reduce: one of `inputs.REDUCTIONS`.
        k: tokens averaged by `topk_mean`.
        query: all query features.
        gallery: all gallery features.
        dtype: of products.
        device: of products.
        as_is: the features can enter a product without being moved or converted, so tiles need no bound for that.
    """
    row_bytes, image_bytes = (features.shape[1:].numel() * dtype.itemsize for features in (query, gallery))
    queries, images = TILE_BYTES // row_bytes, TILE_BYTES // image_bytes
    if reduce == "attr_avg":
        return AttributeMean(min(2048, queries), min(2048, images))
    if reduce.startswith("attr_"):
        # 2048 x 2048 temporary scores of one attribute are one tile of 16 MB.
        return AttributeReduction(min(2048, queries), min(2048, images), reduce.removeprefix("attr_"))
    if reduce == "dot":
        return InnerProduct(len(query), len(gallery)) if as_is else InnerProduct(queries, images)
    tokens = gallery.shape[1]
    if reduce == "mean" or tokens == 1 or (reduce == "topk_mean" and k >= tokens):
        return TokenMean(queries, images)
    counted = {"topk_mean": k, "max": 1, "logsumexp": None}[reduce]
    return TokenReduction(queries, images, tokens, counted, dtype, image_bytes, on_cpu=device.type == "cpu")


class InnerProduct:
    """Inner product of single vectors; the other reductions differ in their operands or in what they do with products."""

    def __init__(self, queries: int, images: int) -> None:
        self.queries = max(1, queries // EVEN_QUERIES) * EVEN_QUERIES
        self.images = max(1, images // EVEN_IMAGES) * EVEN_IMAGES

    def query_operand(self, query: Tensor) -> Tensor:
        return query

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        torch.mm(query, gallery.t(), out=scores)


class TokenMean(InnerProduct):
    """Mean of the inner products with all tokens: the inner product with the mean token."""

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery.mean(dim=1)


class AttributeMean(InnerProduct):
    """Mean of the cosines attribute by attribute: one inner product of all of them."""

    def query_operand(self, query: Tensor) -> Tensor:
        return _unit(query).div_(query.shape[1]).flatten(1)

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return _unit(gallery).flatten(1)


class AttributeReduction(InnerProduct):
    """Cosine attribute by attribute, then their maximum, minimum or a log-sum-exp.

    The exponentials of `lsp_*` need no shift: a cosine lies in [-1, 1].
    """

    def __init__(self, queries: int, images: int, form: str) -> None:
        super().__init__(queries, images)
        self.form = form

    def query_operand(self, query: Tensor) -> Tensor:
        return _unit(query)

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return _unit(gallery)

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        total = cosine = None
        for attribute in range(query.shape[1]):
            cosine = torch.mm(query[:, attribute], gallery[:, attribute].t(), out=cosine)
            if self.form == "lsp_max":
                cosine.exp_()
            elif self.form == "lsp_min":
                cosine.neg_().exp_()
            if total is None:
                total, cosine = cosine, None
            elif self.form == "max":
                torch.maximum(total, cosine, out=total)
            elif self.form == "min":
                torch.minimum(total, cosine, out=total)
            else:
                total += cosine
        assert total is not None
        if self.form.startswith("lsp"):
            total.log_()
        scores.copy_(total.neg_() if self.form == "lsp_min" else total)


def _unit(features: Tensor) -> Tensor:
    return features / torch.linalg.vector_norm(features, dim=2, keepdim=True).clamp_(min=NORM_FLOOR)


class TokenReduction(InnerProduct):
    """Mean of the k largest inner products with the tokens of an image, or their log-sum-exp (`k=None`).

    For a piece of m images the product fills scratch `[T, m * q]`: every token is one contiguous slab, and the reduction
    over tokens is element-wise work on slabs (see `selection_network`).
    """

    def __init__(
        self,
        queries: int,
        images: int,
        tokens: int,
        k: int | None,
        dtype: torch.dtype,
        image_bytes: int,
        *,
        on_cpu: bool,
    ) -> None:
        self.tokens, self.k, self._on_cpu = tokens, k, on_cpu
        self._network = selection_network(tokens, k) if k is not None and k > 1 else None
        self._slabs = self._network.slabs if self._network else tokens
        self._pairs = (_CPU_SCRATCH_BYTES if on_cpu else _GPU_SCRATCH_BYTES) // (self._slabs * dtype.itemsize)
        self._images_of_piece = images
        if on_cpu:
            self._pairs, self._images_of_piece = min(self._pairs, _CPU_PAIRS), _CPU_OPERAND_BYTES // image_bytes
        super().__init__(min(4096, queries, self._pairs // EVEN_QUERIES), images)
        self._scratch: list[Tensor] = []

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        # As the product is [T * images, D] x [D, queries], 16 images at a time are enough to leave no rest.
        step = max(1, min(self._pairs // len(query), self._images_of_piece) // EVEN_QUERIES) * EVEN_QUERIES
        lanes = torch.get_num_threads() if self._on_cpu and self._network else 1
        starts = range(0, len(gallery), step)
        for first in range(0, len(starts), lanes):
            pieces = []
            for lane, start in enumerate(starts[first : first + lanes]):
                images = gallery[start : start + step]
                pairs = len(images) * len(query)
                scratch = self._lane(lane, self._slabs * pairs, query).view(self._slabs, pairs)
                tokens_first = images.transpose(0, 1).reshape(self.tokens * len(images), -1)
                torch.mm(tokens_first, query.t(), out=scratch[: self.tokens].view(-1, len(query)))
                pieces.append((scratch, scores[:, start : start + step]))
            run_all(self._reduce, pieces)

    def _lane(self, lane: int, elements: int, like: Tensor) -> Tensor:
        """Scratch of one thread, kept between pieces."""
        while len(self._scratch) <= lane:
            self._scratch.append(like.new_empty(0))
        if self._scratch[lane].numel() < elements:
            self._scratch[lane] = like.new_empty(elements)
        return self._scratch[lane][:elements]

    def _reduce(self, piece: tuple[Tensor, Tensor]) -> None:
        scratch, scores = piece
        if self._network is None:
            reduced = torch.logsumexp(scratch, dim=0) if self.k is None else torch.amax(scratch, dim=0)
        elif self._on_cpu:
            # numpy: half the cost of a call of the torch functions, and its loops run without the interpreter lock
            total = self._network.sum_of_largest(scratch.numpy(), np.maximum, np.minimum)
            total *= total.dtype.type(1 / self._network.k)
            np.copyto(scores.numpy(), total.reshape(scores.shape[1], scores.shape[0]).T)
            return
        else:
            reduced = self._network.sum_of_largest(scratch, torch.maximum, torch.minimum).mul_(1 / self._network.k)
        scores.copy_(reduced.view(scores.shape[1], scores.shape[0]).t())
