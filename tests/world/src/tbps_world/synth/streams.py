"""One random stream per item, named by what it is for, so that no item depends on the order of generation."""

import hashlib

import numpy as np

WORLD_VERSION = 1
"""Raised whenever the same seed would draw other pixels or write other words."""


def stream(seed: int, layout: str, item: int | str, view: int, purpose: str) -> np.random.Generator:
    """Return the random stream of one item.

    Args:
        seed: seed of the world.
        layout: name of the layout (or of the pool of pictures) the item belongs to.
        item: number or name of the person or record.
        view: number of the view; 0 where an item has no views.
        purpose: what is drawn from the stream, such as "camera" or "caption 1".

    Returns:
        A PCG64 generator seeded by a SHA-256 digest of the arguments: equal on every platform.
    """
    name = f"{WORLD_VERSION}|{seed}|{layout}|{item}|{view}|{purpose}"
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
