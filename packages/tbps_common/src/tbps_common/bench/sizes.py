"""Sizes of the benchmark's data sets, and the names of what is compared; light, for the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tbps_common.errors import InputError


@dataclass(frozen=True)
class Sizes:
    """Shape of the features and the reduction that scores them.

    Attributes:
        queries: Q.
        gallery: G.
        tokens: tokens (or attributes) of an image; 1 for single vectors.
        dim: width of a vector.
        positives: fewest and most gallery images of one identity.
        reduce: name of the reduction.
    """

    queries: int
    gallery: int
    tokens: int
    dim: int
    positives: tuple[int, int]
    reduce: str


PRESETS = {
    "itcpr": Sizes(2202, 20510, 32, 256, (1, 3), "topk_mean"),
    "cuhk": Sizes(6156, 3074, 1, 512, (1, 5), "dot"),
    "icfg": Sizes(19848, 19848, 1, 512, (10, 30), "dot"),
    "wide": Sizes(64, 1_000_000, 1, 512, (1, 3), "dot"),
    "attr": Sizes(1000, 3074, 16, 768, (1, 5), "attr_avg"),
    "small": Sizes(256, 2048, 32, 64, (1, 5), "topk_mean"),
}

REDUCTIONS = (
    "dot",
    *("topk_mean", "max", "mean", "logsumexp"),
    *("attr_avg", "attr_max", "attr_min", "attr_lsp_max", "attr_lsp_min"),
)

COMPARED = ("naive", "broadcast", "torchmetrics", "faiss", "pml")
"""Names for `--against`; the bare product (`gemm`) and this package (`ours`) always run."""


def chosen_sizes(preset: str, changes: Mapping[str, Any]) -> Sizes:
    """A preset with the given sizes put in place of its own; `None` keeps the preset's.

    Raises:
        InputError: the reduction does not fit the number of tokens.
    """
    sizes = replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
    if changes.get("reduce") is None and changes.get("tokens") is not None:
        if sizes.tokens == 1:
            sizes = replace(sizes, reduce="dot")
        elif sizes.reduce == "dot":
            sizes = replace(sizes, reduce="topk_mean")
    if sizes.reduce == "dot" and sizes.tokens != 1:
        raise InputError(f"--reduce dot scores single vectors: use --tokens 1 instead of {sizes.tokens}.")
    return sizes
