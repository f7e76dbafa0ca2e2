"""Where generated pictures and their records go: folders and files by ranges of caption numbers, as in the release."""

import hashlib

from tbps_common.datasets.sda import SHARDS

# The release's ranges; more captions than its 70,000 go on in the same steps.
_STEP = 5000
_RANGES = tuple((int(a), int(b)) for a, b in (name.removesuffix(".json").split("_")[1:] for name in SHARDS))


def caption_range(index: int) -> tuple[int, int]:
    """The range `(a, b)` that holds caption `index`, b excluded."""
    last = _RANGES[-1][1]
    if index >= last:
        start = last + (index - last) // _STEP * _STEP
        return start, start + _STEP
    return next(bounds for bounds in _RANGES if bounds[0] <= index < bounds[1])


def ranges(captions: int) -> list[tuple[int, int]]:
    """All ranges of the release, and those beyond them that so many captions need."""
    found = list(_RANGES)
    while found[-1][1] < captions:
        found.append(caption_range(found[-1][1]))
    return found


def image_name(index: int, variant: int) -> str:
    """Of a picture, below the image root: `c_0_5000/17_3.jpg`."""
    start, stop = caption_range(index)
    return f"c_{start}_{stop}/{index}_{variant}.jpg"


def annotation_name(bounds: tuple[int, int]) -> str:
    """Of the JSON file of a range: `sda_0_5000.json`."""
    return f"sda_{bounds[0]}_{bounds[1]}.json"


def image_seed(*parts: int | str) -> int:
    """63 bits that depend on all parts and nothing else."""
    text = "/".join(map(str, parts)).encode("utf-8")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
