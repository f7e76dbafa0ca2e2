"""Similarity of attribute sets without the `N x M x K x C` tensor that the definition suggests."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diana.model.config import SIM_TYPES
from tbps_common.errors import InputError

NORM_FLOOR = 1e-8


def attribute_similarity(a: Tensor, b: Tensor, sim_type: str = "avg", chunk: int | None = None) -> Tensor:
    """Attribute-to-attribute cosine similarities of all pairs, reduced over the attributes.

    With `s_k(i, j) = cos(a_ik, b_jk)`: `avg` is their mean, `max` and `min` their extremes, `lsp_max` is
    `log sum_k exp(s_k)` and `lsp_min` is `-log sum_k exp(-s_k)`. The mean of K inner products is one inner product of
    the K attributes laid end to end, hence a single matrix product; the other reductions run over K products of
    `[N, C] x [C, M]`. Differentiable; memory is that of a few `[N, M]` matrices.

    Args:
        a: `[N, K, C]`.
        b: `[M, K, C]`.
        sim_type: one of `SIM_TYPES`.
        chunk: rows of `a` scored at a time; all by default. The result does not depend on it.

    Returns:
        `[N, M]` in the dtype of the inputs.

    Raises:
        InputError: an unknown `sim_type`, shapes that do not fit, or a chunk below 1.
    """
    if sim_type not in SIM_TYPES:
        raise InputError(f"sim_type must be one of {', '.join(SIM_TYPES)}, but it is {sim_type!r}.")
    if a.dim() != 3 or b.dim() != 3 or a.shape[1:] != b.shape[1:]:
        raise InputError(
            f"Attributes must be [N, K, C] and [M, K, C], but they are {list(a.shape)} and {list(b.shape)}."
        )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, but it is {chunk}.")
    a, b = _unit(a), _unit(b)
    if chunk is None or chunk >= len(a):
        return _reduced(a, b, sim_type)
    return torch.cat([_reduced(rows, b, sim_type) for rows in a.split(chunk)])


def _unit(attributes: Tensor) -> Tensor:
    return attributes / attributes.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def _reduced(a: Tensor, b: Tensor, sim_type: str) -> Tensor:
    if sim_type == "avg":
        return a.flatten(1) @ b.flatten(1).t() / a.shape[1]
    products = (a[:, k] @ b[:, k].t() for k in range(a.shape[1]))  # each (N, M)
    if sim_type == "max":
        return _fold(torch.maximum, products)
    if sim_type == "min":
        return _fold(torch.minimum, products)
    # Cosines lie in [-1, 1], so their exponentials need no protection against overflow.
    if sim_type == "lsp_max":
        return _fold(torch.add, (cosines.exp() for cosines in products)).log()
    return -_fold(torch.add, ((-cosines).exp() for cosines in products)).log()


def _fold(combine: Callable[[Tensor, Tensor], Tensor], terms: Iterator[Tensor]) -> Tensor:
    result = next(terms)
    for term in terms:
        result = combine(result, term)
    return result
