"""Pictures of results: ranked lists (what a query found, right or wrong) and CMC curves, as PNG files."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

ImagePath = str | os.PathLike[str]
Colour = tuple[int, int, int]

_GREEN: Colour = (34, 139, 80)
_RED: Colour = (200, 62, 62)
_GREY: Colour = (150, 156, 164)
_INK: Colour = (32, 36, 42)
_FAINT: Colour = (110, 116, 124)
_RULE: Colour = (224, 227, 231)
_MAT: Colour = (240, 241, 243)
_WHITE: Colour = (255, 255, 255)

_CELL = (112, 224)  # pedestrian crops are about twice to three times as high as wide
_FRAME = 5
_GAP = 10
_MARGIN = 18
_CAPTION = 24
_TEXT_WIDTH = 250
_BODY, _SMALL, _TITLE = 15, 13, 19
_TITLE_HEIGHT = 28


@dataclass(frozen=True)
class Hit:
    """One retrieved image; `correct` is `None` where nobody knows (a search in one's own folder)."""

    image: ImagePath
    score: float
    correct: bool | None = None


@dataclass(frozen=True)
class RankedQuery:
    """A query (text, image, or both) and what it found, best first; `truth` is an image that should be found."""

    text: str | None = None
    image: ImagePath | None = None
    hits: Sequence[Hit] = ()
    truth: ImagePath | None = None


def example_queries(first_ranks: Sequence[int], count: int, *, misses: int = 2) -> list[int]:
    """Queries worth a picture, spread over the split: most found at rank 1, and some that were not.

    Args:
        first_ranks: rank of each query's first correct image, counted from 1 (anything else: none was found).
        count: queries to choose.
        misses: at least so many of them were not found at rank 1, if there are any.

    Returns:
        Positions of at most `count` queries, in ascending order.
    """
    found = [query for query, rank in enumerate(first_ranks) if rank == 1]
    missed = [query for query, rank in enumerate(first_ranks) if rank != 1]
    wrong = min(len(missed), max(misses, count - len(found)))
    return sorted(spread(found, count - wrong) + spread(missed, wrong))


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread, in their order."""
    count = min(count, len(items))
    return [items[(2 * step + 1) * len(items) // (2 * count)] for step in range(count)]


def ranked_list(
    path: str | os.PathLike[str], queries: Sequence[RankedQuery], *, columns: int = 10, title: str | None = None
) -> Path:
    """Draw one row per query: its text and image, then its hits with rank and score.

    The frame of a hit is green if it is correct, red if it is not, grey if that is unknown; a tick or cross beside the
    rank says the same without colour. An image that cannot be read leaves an empty cell saying so, because the results
    of a long evaluation are worth more than one picture.

    Args:
        path: PNG file to write, whole or not at all.
        queries: rows from top to bottom.
        columns: hits shown per query.
        title: line above the rows.

    Returns:
        The path written.

    Raises:
        InputError: there is no query, or `columns` is not positive.
    """
    from PIL import Image, ImageDraw

    if not queries:
        raise InputError("A ranked list needs at least one query; choose how many to draw.")
    if columns < 1:
        raise InputError(f"A ranked list needs at least one column, not {columns}.")
    shown = min(columns, max(1, max(len(query.hits) for query in queries)))
    has_text = any(query.text for query in queries)
    given = [role for role in ("image", "truth") if any(getattr(query, role) is not None for query in queries)]

    left = _MARGIN + (_TEXT_WIDTH + 2 * _GAP if has_text else 0)
    hits_left = left + len(given) * (_CELL[0] + _GAP) + (2 * _GAP if given else 0)
    width = hits_left + shown * (_CELL[0] + _GAP) - _GAP + _MARGIN
    title_lines = _wrap(title, width - 2 * _MARGIN, 3, _font(_TITLE, bold=True)) if title else []
    header = _MARGIN + len(title_lines) * _TITLE_HEIGHT + (_GAP if title_lines else 0)
    row_height = _CELL[1] + _CAPTION + 2 * _GAP
    sheet = Image.new("RGB", (width, header + row_height * len(queries) - _GAP + _MARGIN // 2), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + number * _TITLE_HEIGHT), line, _INK, _font(_TITLE, bold=True))
    for number, query in enumerate(queries):
        top = header + number * row_height
        if number:
            draw.line((_MARGIN, top - _GAP, width - _MARGIN, top - _GAP), _RULE)
        if query.text:
            _draw_text(draw, query.text, (_MARGIN, top))
        for column, role in enumerate(given):
            picture = getattr(query, role)
            if picture is not None:
                corner = (left + column * (_CELL[0] + _GAP), top)
                _paste(sheet, draw, picture, corner, None)
                _centred(draw, {"image": "query", "truth": "target"}[role], corner, _FAINT)
        for place, hit in enumerate(query.hits[:shown]):
            _draw_hit(sheet, draw, hit, place + 1, (hits_left + place * (_CELL[0] + _GAP), top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def _draw_hit(sheet: "Image.Image", draw: "ImageDraw.ImageDraw", hit: Hit, rank: int, corner: tuple[int, int]) -> None:
    correct = None if hit.correct is None else bool(hit.correct)  # a comparison of tensors gives a tensor
    colour = {True: _GREEN, False: _RED, None: _GREY}[correct]
    _paste(sheet, draw, hit.image, corner, colour)
    baseline = corner[1] + _CELL[1] + 5
    mark = {True: " \N{CHECK MARK}", False: " \N{BALLOT X}", None: ""}[correct]
    draw.text((corner[0] + 1, baseline), f"{rank}{mark}", colour if mark else _INK, _font(_SMALL, bold=True))
    draw.text((corner[0] + _CELL[0] - 1, baseline), _number(hit.score), _FAINT, _font(_SMALL), anchor="ra")


def _number(score: float) -> str:
    return f"{score:.3f}" if abs(score) < 100 else f"{score:.4g}"


def _paste(
    sheet: "Image.Image",
    draw: "ImageDraw.ImageDraw",
    picture: ImagePath,
    corner: tuple[int, int],
    frame: Colour | None,
) -> None:
    """Fit a picture into a cell (never cropped, never stretched) and frame it."""
    from PIL import Image, ImageOps

    from tbps_common.images import read_image

    box = (corner[0], corner[1], corner[0] + _CELL[0] - 1, corner[1] + _CELL[1] - 1)
    draw.rectangle(box, _MAT, frame or _RULE, _FRAME if frame else 1)
    border = _FRAME if frame else 1
    room = (_CELL[0] - 2 * border, _CELL[1] - 2 * border)
    try:
        fitted = ImageOps.contain(read_image(picture), room, Image.Resampling.LANCZOS)
    except DatasetError:
        _centred(draw, "cannot be read", (corner[0], corner[1] - _CELL[1] // 2), _FAINT)
        return
    sheet.paste(fitted, (corner[0] + (_CELL[0] - fitted.width) // 2, corner[1] + (_CELL[1] - fitted.height) // 2))


def _centred(draw: "ImageDraw.ImageDraw", text: str, corner: tuple[int, int], colour: Colour) -> None:
    draw.text((corner[0] + _CELL[0] // 2, corner[1] + _CELL[1] + 5), text, colour, _font(_SMALL), anchor="ma")


def _draw_text(draw: "ImageDraw.ImageDraw", text: str, corner: tuple[int, int]) -> None:
    font = _font(_BODY)
    line_height = round(_BODY * 1.4)
    lines = _wrap(text, _TEXT_WIDTH, (_CELL[1] + _CAPTION) // line_height, font)
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height), line, _INK, font)


def _wrap(text: str, width: float, max_lines: int, font: "ImageFont.FreeTypeFont") -> list[str]:
    """Break text at spaces, or inside a word that is wider than a line; the last line ends with an ellipsis if cut."""
    printable = "".join(character if character.isprintable() else " " for character in text[:4000])
    lines = [""]
    for word in printable.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "\N{HORIZONTAL ELLIPSIS}") > width:
            lines[-1] = lines[-1][:-1].rstrip()
        lines[-1] += "\N{HORIZONTAL ELLIPSIS}"
    return lines


@cache
def _font(size: int, bold: bool = False) -> "ImageFont.FreeTypeFont":
    # matplotlib brings DejaVu along, so that pictures look the same on every machine.
    from matplotlib import get_data_path
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", name), size)


def cmc_curve(path: str | os.PathLike[str], curves: Mapping[str, Sequence[float]], *, title: str | None = None) -> Path:
    """Draw cumulative matching curves: the share of queries with a correct image among the first k.

    Args:
        path: PNG file to write, whole or not at all.
        curves: name -> R@1, R@2, ... in percent; the legend gives each curve's R@1.
        title: line above the plot.

    Returns:
        The path written.

    Raises:
        InputError: there is no curve, or one is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not curves or not all(len(curve) for curve in curves.values()):
        raise InputError("A CMC picture needs at least one curve with at least one value.")
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(len(curve) for curve in curves.values())
    for name, curve in curves.items():
        ranks = range(1, len(curve) + 1)
        marker = "o" if len(curve) <= 30 else ""
        axes.plot(ranks, list(curve), marker=marker, markersize=4, linewidth=2, label=f"{name}  (R@1 {curve[0]:.1f} %)")
    lowest = min(min(curve) for curve in curves.values())
    axes.set_ylim(max(0.0, 10 * (lowest // 10) - 5), 102)
    axes.set_xlim(0.5, longest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("rank k")
    axes.set_ylabel("queries with a correct image in the first k (%)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    if title:
        axes.set_title(title, fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
