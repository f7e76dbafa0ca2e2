"""What the filter judges a picture by: how much its colour channels differ, and whether a body can be found in it.

The paper removes "greyscale-like images by statistics of channel differences" and "malformed persons by key points"
without stating its statistics; those below are ours. Nothing here needs a model.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Key points of COCO, as pose models number them.
HEAD = (0, 1, 2, 3, 4)
SHOULDERS = (5, 6)
HIPS = (11, 12)
ANKLES = (15, 16)

GREYSCALE = "greyscale"
FEW_KEYPOINTS = "few key points"
SMALL_PERSON = "key points span too little"
WRONG_ORDER = "head, shoulders, hips and ankles out of order"


@dataclass(frozen=True)
class Chroma:
    """How colourful a picture is, 0 (greyscale) to 255.

    Attributes:
        mean: of max(R, G, B) - min(R, G, B) over the pixels.
        spread: the larger standard deviation of R - G and G - B over the pixels. Toned greyscale has colour
            everywhere, but nearly the same.
    """

    mean: float
    spread: float


def chroma(picture: Image.Image) -> Chroma:
    """Measure an RGB picture; JPEG's coarse colours are averaged out over 4 x 4 pixels where there are that many."""
    small = picture.reduce(4) if min(picture.size) >= 64 else picture
    pixels = np.asarray(small, dtype=np.int16).reshape(-1, 3)  # (pixels, RGB)
    difference = pixels.max(axis=1) - pixels.min(axis=1)
    red_green, green_blue = pixels[:, 0] - pixels[:, 1], pixels[:, 1] - pixels[:, 2]
    return Chroma(float(difference.mean()), float(max(red_green.std(), green_blue.std())))


def judge_colour(measured: Chroma, min_mean: float, min_spread: float) -> str | None:
    """Why a picture is dropped for its colours, or None."""
    return GREYSCALE if measured.mean < min_mean or measured.spread < min_spread else None


def judge_pose(
    keypoints: np.ndarray,
    scores: np.ndarray,
    height: int,
    *,
    min_score: float,
    min_count: int,
    min_extent: float,
    any_order: bool = False,
) -> str | None:
    """Why a person counts as malformed, or None.

    Args:
        keypoints: `[17, 2]`, x and y in pixels, in COCO's order.
        scores: `[17]`, confidence of each.
        height: of the picture, in pixels.
        min_score: from which a key point counts.
        min_count: fewest that count.
        min_extent: least vertical extent of those that count, as a share of the picture.
        any_order: do not require head above shoulders above hips above ankles. (Parts without a key point that counts
            are left out.)
    """
    sure = scores >= min_score
    if int(sure.sum()) < min_count:
        return FEW_KEYPOINTS
    if not sure.any():
        return None
    y = keypoints[:, 1]
    if float(y[sure].max() - y[sure].min()) < min_extent * height:
        return SMALL_PERSON
    parts = [[part for part in group if sure[part]] for group in (HEAD, SHOULDERS, HIPS, ANKLES)]
    levels = [float(y[part].mean()) for part in parts if part]
    if not any_order and levels != sorted(levels):
        return WRONG_ORDER
    return None
