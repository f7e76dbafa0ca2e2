"""How the score of a pair comes from its features: one class for each kind of reduction.

A reduction works on tiles. `gallery_operand` and `query_operand` arrange the features of a tile once, `score` fills the
scores of one query tile against one gallery tile. `images` and `queries` bound a tile so that everything allocated
besides the scores stays within some tens of megabytes, whatever the sizes of the data.
"""

from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tbps_common.ranking.selection_network import selection_network
from tbps_common.ranking.threads import run_all

TILE_BYTES = 1 << 24
NORM_FLOOR = 1e-8

# One piece of a token reduction on CPU: the slabs must stay in the core's cache, yet be long enough for the cost of a
# call to vanish (16k pairs of 32 tokens take 2.4 MB). A GPU wants the longest slabs the memory bound allows.
_CPU_PAIRS, _CPU_SCRATCH_BYTES, _CPU_OPERAND_BYTES = 1 << 14, 5 << 19, 1 << 22
_GPU_SCRATCH_BYTES = 3 << 24


class Reduction(Protocol):
    """What `score_rows` needs of a reduction."""

    images: int
    queries: int

    def query_operand(self, query: Tensor) -> Tensor: ...

    def gallery_operand(self, gallery: Tensor) -> Tensor: ...

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None: ...


def reduction(reduce: str, k: int, query: Tensor, gallery: Tensor, dtype: torch.dtype, as_is: bool) -> Reduction:
    """The reduction named `reduce` for features of these shapes.

    Args:
        reduce: one of `inputs.REDUCTIONS`.
        k: tokens averaged by `topk_mean`.
        query: all query features.
        gallery: all gallery features.
        dtype: dtype of products.
        as_is: the features can enter a product without being moved or converted, so tiles need no bound for that.
    """
    itemsize = torch.finfo(dtype).bits // 8
    row_bytes, image_bytes = query[0].numel() * itemsize, gallery.shape[1:].numel() * itemsize
    if reduce.startswith("attr_"):
        return AttributeReduction(reduce.removeprefix("attr_"), row_bytes)
    tokens = gallery.shape[1] if gallery.dim() == 3 else 1
    if reduce == "dot":
        return Dot(len(query), len(gallery)) if as_is else Dot(TILE_BYTES // row_bytes, TILE_BYTES // image_bytes)
    if reduce == "mean" or (reduce == "topk_mean" and k >= tokens):
        return TokenMean(TILE_BYTES // row_bytes, TILE_BYTES // image_bytes)
    if reduce == "max" or k == 1 and reduce == "topk_mean":
        return TokenReduction(1, image_bytes, row_bytes)
    return TokenReduction(k if reduce == "topk_mean" else None, image_bytes, row_bytes)


class Dot:
    """Inner product of single vectors."""

    def __init__(self, queries: int, images: int) -> None:
        self.queries, self.images = max(1, queries), max(1, images)

    def query_operand(self, query: Tensor) -> Tensor:
        return query

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        torch.mm(query, gallery.t(), out=scores)


class TokenMean(Dot):
    """Mean of the inner products with all tokens: the inner product with the mean token."""

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery.mean(dim=1)


class AttributeReduction:
    """Cosine attribute by attribute, then average, maximum, minimum or a log-sum-exp over the attributes.

    The exponentials of `lsp_*` need no shift: a cosine lies in [-1, 1].
    """

    def __init__(self, form: str, row_bytes: int) -> None:
        self.form = form
        # 2048 x 2048 temporary scores of one attribute are one tile of 16 MB.
        self.queries = self.images = max(1, min(2048, TILE_BYTES // row_bytes))

    def query_operand(self, query: Tensor) -> Tensor:
        unit = self.gallery_operand(query)
        return unit.div_(query.shape[1]) if self.form == "avg" else unit

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery / torch.linalg.vector_norm(gallery, dim=2, keepdim=True).clamp_(min=NORM_FLOOR)

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        if self.form == "avg":
            torch.mm(query.flatten(1), gallery.flatten(1).t(), out=scores)
            return
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


class TokenReduction:
    """Mean of the k largest inner products with the tokens of an image, or their log-sum-exp (`k=None`).

    For a piece of m images the product fills scratch `[T, m * q]`: every token is one contiguous slab, and the reduction
    over tokens is element-wise work on slabs (see `selection_network`).
    """

    def __init__(self, k: int | None, image_bytes: int, row_bytes: int) -> None:
        self.k = k
        self.images = max(1, TILE_BYTES // image_bytes)
        self.queries = max(1, min(4096, TILE_BYTES // row_bytes))
        self._image_bytes = image_bytes
        self._scratch: list[Tensor] = []

    def query_operand(self, query: Tensor) -> Tensor:
        return query

    def gallery_operand(self, gallery: Tensor) -> Tensor:
        return gallery

    def score(self, query: Tensor, gallery: Tensor, scores: Tensor) -> None:
        count, tokens = gallery.shape[:2]
        on_cpu = query.device.type == "cpu"
        by_network = self.k is not None and self.k > 1
        slabs = selection_network(tokens, self.k).slabs if self.k is not None and self.k > 1 else tokens
        itemsize = query.element_size()
        pairs = (_CPU_SCRATCH_BYTES if on_cpu else _GPU_SCRATCH_BYTES) // (slabs * itemsize)
        if on_cpu:
            pairs = min(pairs, _CPU_PAIRS)
        step = min(count, max(1, pairs // len(query)))
        if on_cpu:
            step = min(step, max(1, _CPU_OPERAND_BYTES // self._image_bytes))
        lanes = torch.get_num_threads() if on_cpu and by_network else 1
        starts = range(0, count, step)
        for first in range(0, len(starts), lanes):
            pieces = []
            for lane, start in enumerate(starts[first : first + lanes]):
                stop = min(start + step, count)
                scratch = self._lane(lane, slabs * (stop - start) * len(query), query)
                scratch = scratch.view(slabs, (stop - start) * len(query))
                tokens_first = gallery[start:stop].transpose(0, 1).reshape(tokens * (stop - start), -1)
                torch.mm(tokens_first, query.t(), out=scratch[:tokens].view(-1, len(query)))
                pieces.append((scratch, scores[:, start:stop]))
            if by_network and on_cpu:
                run_all(partial(self._reduce_piece, tokens), pieces)
            else:
                for piece in pieces:
                    self._reduce_piece(tokens, piece)

    def _lane(self, lane: int, elements: int, like: Tensor) -> Tensor:
        """Scratch of one thread, kept between pieces."""
        while len(self._scratch) <= lane:
            self._scratch.append(like.new_empty(0))
        if self._scratch[lane].numel() < elements:
            self._scratch[lane] = like.new_empty(elements)
        return self._scratch[lane][:elements]

    def _reduce_piece(self, tokens: int, piece: tuple[Tensor, Tensor]) -> None:
        scratch, scores = piece
        if self.k is None:
            reduced = torch.logsumexp(scratch, dim=0)
        elif self.k == 1:
            reduced = torch.amax(scratch, dim=0)
        else:
            network = selection_network(tokens, self.k)
            if scratch.device.type == "cpu":
                # numpy: half the cost of a call of the torch functions, and its loops run without the interpreter lock
                total = network.sum_of_largest(scratch.numpy(), np.maximum, np.minimum)
                total *= total.dtype.type(1 / self.k)
                np.copyto(scores.numpy(), total.reshape(scores.shape[1], scores.shape[0]).T)
                return
            reduced = network.sum_of_largest(scratch, torch.maximum, torch.minimum).mul_(1 / self.k)
        scores.copy_(reduced.view(scores.shape[1], scores.shape[0]).t())
