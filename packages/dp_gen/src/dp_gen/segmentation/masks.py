"""From a picture of class numbers to one mask of attribute types."""

from collections.abc import Mapping, Sequence

import numpy as np

SMALLEST_SHARE = 0.005  # of the image; smaller components are noise of the parser

# Classes of the ATR data set, which human parsers for clothes are trained on.
ATR_CLASSES = {
    "hair": (2,),
    "uppercloth": (4, 7),  # upper clothes, dress
    "bottomcloth": (5, 6),  # skirt, trousers
    "hat": (1,),
    "shoes": (9, 10),
    "bag": (16,),
    "scarf": (17,),
    "sunglasses": (3,),
    "belt": (8,),
}
ATR_COUNT = 18
DEFAULT_TYPES = ("hair", "uppercloth", "bottomcloth")


def type_mask(regions: Mapping[str, np.ndarray], types: Sequence[str], shape: tuple[int, int]) -> np.ndarray:
    """One uint8 mask of all types: the k-th type has the value k, from 1; 0 is background.

    Components of a type that are smaller than 0.5 % of the image are dropped; where types overlap, the first counts.

    Args:
        regions: bool [h, w] of each type.
        types: in their fixed order.
        shape: height and width of the image.
    """
    mask = np.zeros(shape, dtype=np.uint8)
    for value, label in enumerate(types, start=1):
        if label in regions:
            mask[large_components(regions[label], SMALLEST_SHARE) & (mask == 0)] = value
    return mask


def tight_box(region: np.ndarray) -> list[int] | None:
    """Half-open box [x1, y1, x2, y2] around the True pixels; None if there are none."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def large_components(region: np.ndarray, share: float) -> np.ndarray:
    """The region without connected components (8 neighbours) of less than `share` of the image."""
    labels = components(region)
    sizes = np.bincount(labels.ravel())
    large = sizes >= share * region.size
    large[0] = False
    return large[labels]


def components(region: np.ndarray) -> np.ndarray:
    """Number of the connected component (8 neighbours) of every True pixel, from 1; 0 elsewhere. int64 [h, w]

    Runs of a row are joined with the runs they touch in the row above.
    """
    parent: list[int] = [0]
    labels = np.zeros(region.shape, dtype=np.int64)

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    above: list[tuple[int, int, int]] = []
    for row, pixels in enumerate(region):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], pixels.astype(np.int8), [0]))))
        runs: list[tuple[int, int, int]] = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist()):
            touching = [root(label) for first, last, label in above if first <= stop and start <= last]
            if touching:
                label = min(touching)
                for other in touching:
                    parent[other] = label
            else:
                label = len(parent)
                parent.append(label)
            labels[row, start:stop] = label
            runs.append((start, stop, label))
        above = runs
    return np.array([root(label) for label in range(len(parent))])[labels]
