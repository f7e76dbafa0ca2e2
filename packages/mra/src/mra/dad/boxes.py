"""Boxes of a detector on their way into the SDA files: cleared of what cannot be learnt from, normalised, rounded."""

from collections.abc import Sequence

from tbps_common.pipeline.stages import Record

DECIMALS = 4
NO_PHRASE, TOO_SMALL, REPEATED = "no phrase", "too small", "repeated"

Corners = tuple[float, float, float, float]


def filter_boxes(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    phrases: Sequence[str],
    size: tuple[int, int],
    *,
    min_side: float,
    overlap: float,
) -> tuple[Record, list[str]]:
    """Clip, filter and normalise the boxes of one picture.

    A box goes if it has no phrase, if less of it than `min_side` of the picture's width or height lies inside the
    picture, or if a surer box with the same phrase covers it. Boxes with different phrases may lie over each other.

    Args:
        boxes: left, top, right, bottom in pixels.
        scores: of the boxes.
        phrases: of the boxes.
        size: width and height of the picture.
        min_side: least width and height, as a share of the picture's.
        overlap: intersection over union from which on two boxes with one phrase are one.

    Returns:
        `{"boxes", "logits", "phrases"}`, the surest first, boxes as centre x, centre y, width, height in 0..1 with four
        decimals; and why each of the others was removed.
    """
    width, height = size
    kept: list[tuple[Corners, float, str]] = []
    removed = []
    for number in sorted(range(len(boxes)), key=lambda place: -scores[place]):
        left, top, right, bottom = boxes[number]
        box = (
            min(max(left / width, 0.0), 1.0),
            min(max(top / height, 0.0), 1.0),
            min(max(right / width, 0.0), 1.0),
            min(max(bottom / height, 0.0), 1.0),
        )
        phrase = phrases[number]
        if not phrase:
            removed.append(NO_PHRASE)
        elif not _is_large_enough(box, size, min_side):
            removed.append(TOO_SMALL)
        elif any(phrase == other and intersection_over_union(box, earlier) > overlap for earlier, _, other in kept):
            removed.append(REPEATED)
        else:
            kept.append((box, scores[number], phrase))
    return {
        "boxes": [centre_form(box) for box, _, _ in kept],
        "logits": [round(score, DECIMALS) for _, score, _ in kept],
        "phrases": [phrase for _, _, phrase in kept],
    }, removed


def _is_large_enough(box: Corners, size: tuple[int, int], min_side: float) -> bool:
    """Also for the training, which cuts the rounded sides down to whole pixels and wants at least one."""
    _, _, width, height = centre_form(box)
    return width >= min_side and height >= min_side and int(width * size[0]) >= 1 and int(height * size[1]) >= 1


def centre_form(box: Corners) -> list[float]:
    """Left, top, right, bottom -> centre x, centre y, width, height, with four decimals."""
    left, top, right, bottom = box
    values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return [round(value, DECIMALS) for value in values]


def intersection_over_union(one: Corners, other: Corners) -> float:
    """Of two boxes given by their corners; 0 for boxes without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
