"""Checks of ids, features and scores. Bad input is refused before any heavy work, with the name of the argument."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbps_common.errors import InputError

TOKEN_REDUCTIONS = ("topk_mean", "max", "mean", "logsumexp")
ATTRIBUTE_REDUCTIONS = ("attr_avg", "attr_max", "attr_min", "attr_lsp_max", "attr_lsp_min")
REDUCTIONS = ("dot", *TOKEN_REDUCTIONS, *ATTRIBUTE_REDUCTIONS)
ON_MISSING = ("error", "skip", "miss")

_CHECK_ELEMENTS = 1 << 24


def identity_array(ids: Any, name: str) -> np.ndarray:
    """Identities as int64 `[N]`.

    Raises:
        TypeError: not a one-dimensional tensor, array or sequence of integers.
        ValueError: an identity does not fit 64 signed bits.
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim == 1 and array.size == 0 and not isinstance(ids, (Tensor, np.ndarray)):
        return np.zeros(0, np.int64)  # an empty list has no type; its length is judged by the caller
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be one-dimensional integers (tensor, array or sequence), "
            f"got {array.ndim} dimensions of {array.dtype}."
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds identities above 2**63 - 1, which do not fit a signed 64-bit integer.")
    return array.astype(np.int64)


def check_count(value: Any, name: str, lowest: int) -> int:
    """`value` as an int of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}.")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")
    return int(value)


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_features(query: Any, gallery: Any, reduce: str, k: int, *, empty_gallery: bool = False) -> None:
    """Refuse features that cannot be scored.

    Args:
        query: `[Q, D]`, or `[Q, K, C]` for attribute reductions.
        gallery: `[G, D]`, `[G, T, D]` for token reductions, or `[G, K, C]`.
        reduce: name of the reduction.
        k: tokens averaged by `topk_mean`.
        empty_gallery: allow G = 0 (one shard of several).

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: unknown reduction, `k` < 1, shapes that do not fit each other, an empty set, NaN or infinity.
    """
    check_choice(reduce, "reduce", REDUCTIONS)
    check_count(k, "k", 1)
    for name, features in (("query_feats", query), ("gallery_feats", gallery)):
        _check_floating(features, name)
    attributes = reduce in ATTRIBUTE_REDUCTIONS
    expected = {"query_feats": 3 if attributes else 2, "gallery_feats": 2 if reduce == "dot" else 3}
    for name, features in (("query_feats", query), ("gallery_feats", gallery)):
        if features.dim() != expected[name]:
            raise ValueError(
                f"{name} must have {expected[name]} dimensions for reduce={reduce!r}, got shape {list(features.shape)}."
            )
        if len(features) == 0 and not (empty_gallery and name == "gallery_feats"):
            raise ValueError(f"{name} is empty: shape {list(features.shape)}.")
        if 0 in features.shape[1:]:
            raise ValueError(f"{name} has an empty dimension: shape {list(features.shape)}.")
    if attributes and query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_feats has {query.shape[1]} attributes and gallery_feats {gallery.shape[1]}; they must be aligned."
        )
    if query.shape[-1] != gallery.shape[-1]:
        raise ValueError(
            f"query_feats has width {query.shape[-1]} and gallery_feats {gallery.shape[-1]}; they must be equal."
        )
    _check_finite(query, "query_feats")
    _check_finite(gallery, "gallery_feats")


def check_matrix(similarity: Any) -> None:
    """Refuse a score matrix unless it is a floating-point `[Q, G]` tensor with at least one entry."""
    _check_floating(similarity, "similarity")
    if similarity.dim() != 2:
        raise ValueError(f"similarity must be [queries, gallery], got shape {list(similarity.shape)}.")
    if similarity.numel() == 0:
        raise ValueError(f"similarity is empty: shape {list(similarity.shape)}.")


def check_scores(block: Tensor, start: int) -> None:
    """Refuse NaN or infinity in rows of scores; `start` is the query of the first row.

    Raises:
        InputError: naming the range of queries and the first row concerned.
    """
    if _is_finite(block):
        return
    bad = next(row for row in range(len(block)) if not _is_finite(block[row]))
    raise InputError(
        f"The scores of queries {start} to {start + len(block) - 1} hold NaN or infinity (first in query {start + bad}): "
        "the features overflow or are damaged."
    )


def _check_floating(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}.")


def _check_finite(features: Tensor, name: str) -> None:
    # In slices along the first dimension: aminmax copies a tensor that is not contiguous, and the features may be a
    # memory map that is larger than memory.
    step = max(1, _CHECK_ELEMENTS // max(1, features[0].numel() if len(features) else 1))
    for start in range(0, len(features), step):
        if not _is_finite(features[start : start + step]):
            raise InputError(
                f"{name} holds NaN or infinity in rows {start} to {min(start + step, len(features)) - 1}: "
                "the model or the stored features are damaged."
            )


def _is_finite(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
