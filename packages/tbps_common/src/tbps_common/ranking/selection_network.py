"""Sum of the k largest of T values for millions of pairs at once, by a network of element-wise minima and maxima.

The values of one token for all pairs lie in one contiguous slab, so every comparator of the network is one maximum and
one minimum over slabs: no per-pair loop, no indices, no allocation. Tokens are dealt into groups as wide as the network;
all groups are sorted together as one wide slab, then halved: with two descending k-lists a and b, `max(a_i, b_{k-1-i})`
are the k largest of their union, in an order that falls and then rises, which a bitonic merger sorts again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Keep = Literal["both", "max", "min"]
Comparator = tuple[int, int, Keep]
Elementwise = Callable[..., Any]


@dataclass(frozen=True)
class SelectionNetwork:
    """A network for the `k` largest of `tokens` values.

    Attributes:
        tokens: number of real values a pair has.
        k: how many of them are added.
        width: values in one group.
        groups: number of groups, a power of two; `width * groups >= tokens`, the rest is filled with -inf.
        sort: comparators `(i, j, keep)` that leave the k largest of a group in wires 0..k-1, descending when there is
            more than one group; `keep` names the outputs anyone reads.
        merge: comparators that sort a falling-then-rising list of k values.
        merged_order: wire that holds the m-th largest after `merge`.
    """

    tokens: int
    k: int
    width: int
    groups: int
    sort: tuple[Comparator, ...]
    merge: tuple[Comparator, ...]
    merged_order: tuple[int, ...]

    @property
    def slabs(self) -> int:
        """Rows of scratch: the padded tokens, and one spare row for each group."""
        return (self.width + 1) * self.groups

    def sum_of_largest(self, scratch: Any, maximum: Elementwise, minimum: Elementwise) -> Any:
        """Add the k largest of the first `tokens` rows of `scratch`, column by column.

        Args:
            scratch: contiguous float array or tensor `[slabs, P]`; destroyed.
            maximum: `numpy.maximum` or `torch.maximum`, called as `maximum(a, b, out=c)`.
            minimum: its counterpart.

        Returns:
            `[P]` sums, a view into `scratch`.
        """
        pairs = scratch.shape[1]
        scratch[self.tokens : self.width * self.groups] = float("-inf")
        rows = scratch.reshape(self.width + 1, self.groups * pairs)
        wires = [rows[wire] for wire in range(self.width)]
        spare = _run(self.sort, wires, rows[self.width], maximum, minimum)
        groups = self.groups
        while groups > 1:
            half = groups // 2 * pairs
            merged = [wire[:half] for wire in wires[: self.k]]
            for rank in range(self.k):
                maximum(merged[rank], wires[self.k - 1 - rank][half : 2 * half], out=merged[rank])
            groups //= 2
            wires, spare = merged, spare[:half]
            if groups > 1:
                spare = _run(self.merge, wires, spare, maximum, minimum)
                wires = [wires[wire] for wire in self.merged_order]
        total = wires[0]
        for wire in wires[1 : self.k]:
            total += wire
        return total


def _run(comparators: tuple[Comparator, ...], wires: list[Any], spare: Any, maximum: Any, minimum: Any) -> Any:
    """Apply comparators in place; returns the row that is spare afterwards (it changes places with the maxima)."""
    for i, j, keep in comparators:
        high, low = wires[i], wires[j]
        if keep == "max":
            maximum(high, low, out=high)
        elif keep == "min":
            minimum(high, low, out=low)
        else:
            maximum(high, low, out=spare)
            minimum(high, low, out=low)
            wires[i], spare = spare, high
    return spare


@lru_cache(maxsize=64)
def selection_network(tokens: int, k: int) -> SelectionNetwork:
    """The network for the `k` largest of `tokens` values, `1 <= k <= tokens`."""
    if not 1 <= k <= tokens:
        raise ValueError(f"k must lie in 1..{tokens} (the number of tokens), got {k}.")
    width = 8
    while width < min(k, tokens):
        width *= 2
    groups = 1
    while width * groups < tokens:
        groups *= 2
    merge, order = _bitonic_merge(k)
    return SelectionNetwork(
        tokens, k, width, groups, _prune(_odd_even_merge_sort(width), set(range(k))), _prune(merge, set(order)), order
    )


def _odd_even_merge_sort(width: int) -> list[tuple[int, int]]:
    """Batcher's network for a power of two, descending: 19 comparators for 8 values, 63 for 16."""
    comparators = []
    run = 1
    while run < width:
        step = run
        while step:
            for start in range(step % run, width - step, 2 * step):
                for i in range(start, start + min(step, width - start - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        comparators.append((i, i + step))
            step //= 2
        run *= 2
    return comparators


def _bitonic_merge(k: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Comparators that sort a falling-then-rising list, and the wire holding each rank afterwards.

    The list is thought to end in +inf up to a power of two, which keeps it falling-then-rising. A comparator that meets
    such a constant only changes names, so it costs nothing.
    """
    size = 1
    while size < k:
        size *= 2
    held: list[int | None] = [*range(k), *[None] * (size - k)]  # None: the constant +inf
    comparators = []
    step = size // 2
    while step:
        for i in range(size):
            if i & step:
                continue
            upper, lower = held[i], held[i + step]
            if lower is None:
                held[i], held[i + step] = None, upper
            elif upper is not None:
                comparators.append((upper, lower))
        step //= 2
    return comparators, tuple(wire for wire in held if wire is not None)


def _prune(comparators: list[tuple[int, int]], wanted: set[int]) -> tuple[Comparator, ...]:
    """Drop the outputs nobody reads, from the last comparator back to the first."""
    kept: list[Comparator] = []
    live = set(wanted)
    for i, j in reversed(comparators):
        if i in live or j in live:
            kept.append((i, j, "both" if i in live and j in live else "max" if i in live else "min"))
            live |= {i, j}
    return tuple(reversed(kept))
