"""Which methods are compared, what each needs and how much of the data it can take. Imports nothing heavy."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tbps_common.bench.presets import Sizes

BROADCAST_IMAGES = 500
"""Images in one block of the broadcast form, as in the released FAFA code."""


@dataclass(frozen=True)
class Method:
    """One way to the metrics; the code is in `methods.RUN`.

    Attributes:
        needs: import names of the optional libraries it needs.
        bytes_per_pair: working memory for one query and one image, for the estimate that scales the queries down.
        query_limit: most queries worth running; the rest of the cost is proportional.
        fits: whether it can score this kind of features.
    """

    needs: tuple[str, ...] = ()
    bytes_per_pair: Callable[[Sizes], int] = lambda sizes: 0
    query_limit: Callable[[Sizes], float] = lambda sizes: math.inf
    fits: Callable[[Sizes], bool] = lambda sizes: True


def _single(sizes: Sizes) -> bool:
    return sizes.reduce == "dot"


def _naive_bytes(sizes: Sizes) -> int:
    # Scores, int64 order and the sort's copies, identities in order, matches, their running sum and its products; and
    # one score for every token before the reduction.
    return 60 + (4 * sizes.tokens if sizes.tokens > 1 else 0)


METHODS = {
    "gemm": Method(),
    "ours": Method(),
    "naive": Method(bytes_per_pair=_naive_bytes),
    "broadcast": Method(
        query_limit=lambda sizes: max(1, (1 << 32) // (sizes.gallery * sizes.tokens * sizes.dim)),
        fits=lambda sizes: sizes.tokens > 1 and not sizes.reduce.startswith("attr_"),
    ),
    "torchmetrics": Method(needs=("torchmetrics",), bytes_per_pair=lambda sizes: _naive_bytes(sizes) + 20),
    "faiss": Method(needs=("faiss",), fits=_single),
    "pml": Method(needs=("pytorch_metric_learning", "faiss"), bytes_per_pair=lambda sizes: 100, fits=_single),
}
"""`gemm` and `ours` always run; the others are chosen with `--against`."""

COMPARED = tuple(name for name in METHODS if name not in ("gemm", "ours"))
