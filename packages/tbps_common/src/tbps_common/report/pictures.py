"""Pictures of results as PNG files: grids of pictures with text, ranked lists (what a query found), CMC curves."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path
from tbps_common.images import read_image

ImagePath = str | os.PathLike[str]
Colour = str | tuple[int, int, int]
Words = tuple[str, Colour]
"""A piece of text and its colour, as Pillow names it."""

_GREEN: Colour = (34, 139, 80)
_RED: Colour = (200, 62, 62)
_GREY: Colour = (150, 156, 164)
_INK: Colour = (32, 36, 42)
_FAINT: Colour = (110, 116, 124)
_RULE: Colour = (224, 227, 231)
_MAT: Colour = (240, 241, 243)

_FRAME = 5
_GAP = 10
_MARGIN = 18
_LABEL = 24
_TEXT_WIDTH = 250
_BODY, _SMALL, _TITLE = 15, 13, 19
_LONGEST_TEXT = 4000  # characters that are looked at


@dataclass(frozen=True)
class Picture:
    """One cell of a grid.

    Attributes:
        image: a file, or a picture in memory.
        label: words below it on the left, bold where they have a colour.
        note: words below it on the right.
        frame: colour of a broad frame.
    """

    image: ImagePath | Image.Image
    label: str | Words = ""
    note: str = ""
    frame: Colour | None = None


@dataclass(frozen=True)
class PictureRow:
    """One row of a grid: pictures (`None` leaves a cell empty), and text on their left, in colours if wanted."""

    pictures: Sequence[Picture | None]
    text: str | Sequence[Words] = ""


@dataclass(frozen=True)
class Hit:
    """One retrieved image; `correct` is `None` where nobody knows (a search in one's own folder)."""

    image: ImagePath | Image.Image
    score: float
    correct: bool | None = None


@dataclass(frozen=True)
class RankedQuery:
    """A query (text, image, or both) and what it found, best first; `truth` is an image that should be found."""

    text: str | None = None
    image: ImagePath | Image.Image | None = None
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
    rank says the same without colour.

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
    if not queries:
        raise InputError("A ranked list needs at least one query; choose how many to draw.")
    if columns < 1:
        raise InputError(f"A ranked list needs at least one column, not {columns}.")
    given = [
        (role, label)
        for role, label in (("image", "query"), ("truth", "target"))
        if any(getattr(query, role) is not None for query in queries)
    ]
    rows = []
    for query in queries:
        own = [(getattr(query, role), label) for role, label in given]
        pictures = [None if image is None else Picture(image, label) for image, label in own]
        rows.append(PictureRow([*pictures, *map(_hit, query.hits[:columns], range(1, columns + 1))], query.text or ""))
    return picture_grid(path, rows, title=title)


def _hit(hit: Hit, rank: int) -> Picture:
    correct = None if hit.correct is None else bool(hit.correct)  # a comparison of tensors gives a tensor
    colour, mark = {
        True: (_GREEN, " \N{CHECK MARK}"),
        False: (_RED, " \N{BALLOT X}"),
        None: (_GREY, ""),
    }[correct]
    score = f"{hit.score:.3f}" if abs(hit.score) < 100 else f"{hit.score:.4g}"
    return Picture(hit.image, (f"{rank}{mark}", colour if mark else _INK), score, colour)


def picture_grid(
    path: str | os.PathLike[str],
    rows: Sequence[PictureRow],
    *,
    title: str | None = None,
    cell: tuple[int, int] = (112, 224),
) -> Path:
    """Draw rows of labelled pictures with text.

    Pictures are fitted into their cells, never cropped or stretched. One that cannot be read leaves an empty cell saying
    so, because the results of long work are worth more than one picture.

    Args:
        path: PNG file to write, whole or not at all.
        rows: from top to bottom.
        title: line above the rows.
        cell: width and height of a picture in pixels (pedestrians are two to three times as high as wide).

    Returns:
        The path written.

    Raises:
        InputError: there is no row.
        OSError: the file cannot be written.
    """
    if not rows:
        raise InputError("A grid of pictures needs at least one row.")
    columns = max(1, max(len(row.pictures) for row in rows))
    labels = any(picture and (picture.label or picture.note) for row in rows for picture in row.pictures)
    left = _MARGIN + (_TEXT_WIDTH + 2 * _GAP if any(row.text for row in rows) else 0)
    width = left + columns * (cell[0] + _GAP) - _GAP + _MARGIN
    title_lines = _wrap(title or "", width - 2 * _MARGIN, 3, _font(_TITLE, bold=True))
    title_height = round(_TITLE * 1.5)
    header = _MARGIN + len(title_lines) * title_height + (_GAP if title_lines else 0)
    height = cell[1] + (_LABEL if labels else 0)
    sheet = Image.new("RGB", (width, header + (height + 2 * _GAP) * len(rows) - _GAP + _MARGIN // 2), "white")
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, title_lines, (_MARGIN, _MARGIN), title_height, _font(_TITLE, bold=True))
    for number, row in enumerate(rows):
        top = header + number * (height + 2 * _GAP)
        if number:
            draw.line((_MARGIN, top - _GAP, width - _MARGIN, top - _GAP), _RULE)
        line_height = round(_BODY * 1.4)
        lines = _wrap(row.text, _TEXT_WIDTH, height // line_height, _font(_BODY))
        _draw_lines(draw, lines, (_MARGIN, top), line_height, _font(_BODY))
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                _draw_picture(sheet, draw, picture, (left + column * (cell[0] + _GAP), top), cell)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def _draw_picture(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Picture, corner: tuple[int, int], cell: tuple[int, int]
) -> None:
    left, top = corner
    border = _FRAME if picture.frame else 1
    draw.rectangle((left, top, left + cell[0] - 1, top + cell[1] - 1), _MAT, picture.frame or _RULE, border)
    try:
        image = picture.image if isinstance(picture.image, Image.Image) else read_image(picture.image, as_shown=True)
        room = (cell[0] - 2 * border, cell[1] - 2 * border)
        fitted = ImageOps.contain(image, room, Image.Resampling.LANCZOS)
        sheet.paste(fitted, (left + (cell[0] - fitted.width) // 2, top + (cell[1] - fitted.height) // 2))
    except DatasetError:
        draw.text((left + cell[0] // 2, top + cell[1] // 2), "cannot be read", _FAINT, _font(_SMALL), anchor="mm")
    label = (picture.label, _FAINT) if isinstance(picture.label, str) else picture.label
    font = _font(_SMALL, bold=not isinstance(picture.label, str))
    room_for_label = cell[0] - 2 - _font(_SMALL).getlength(f" {picture.note}")
    _draw_lines(draw, _wrap([label], room_for_label, 1, font), (left + 1, top + cell[1] + 5), 0, font)
    draw.text((left + cell[0] - 1, top + cell[1] + 5), picture.note, _FAINT, _font(_SMALL), anchor="ra")


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Sequence[Words]],
    corner: tuple[int, int],
    height: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    for number, line in enumerate(lines):
        left = float(corner[0])
        for text, colour in line:
            draw.text((left, corner[1] + number * height), text, colour, font)
            left += font.getlength(text)


def _wrap(text: str | Sequence[Words], width: float, most: int, font: ImageFont.FreeTypeFont) -> list[list[Words]]:
    """At most `most` lines, broken at spaces or inside a word that is wider than a line; a cut ends in an ellipsis."""
    lines: list[list[Words]] = []
    filled = width
    for piece, colour in _pieces([(text, _INK)] if isinstance(text, str) else text, width, font):
        length = font.getlength(piece)
        if filled + length > width or not lines:
            if piece == " ":
                continue
            if len(lines) == most:
                _end_in_ellipsis(lines[-1], width, font)
                break
            lines.append([])
            filled = 0.0
        lines[-1].append((piece, colour))
        filled += length
    return lines


def _pieces(text: Sequence[Words], width: float, font: ImageFont.FreeTypeFont) -> Iterator[Words]:
    """Words and single spaces; a word that is wider than a line comes in parts."""
    for words, colour in text:
        printable = "".join(character if character.isprintable() else " " for character in words[:_LONGEST_TEXT])
        for word in re.findall(r"\s+|\S+", printable):
            part = ""
            for character in word if word.strip() else " ":
                if part and font.getlength(part + character) > width:
                    yield part, colour
                    part = ""
                part += character
            yield part, colour


def _end_in_ellipsis(line: list[Words], width: float, font: ImageFont.FreeTypeFont) -> None:
    mark = "\N{HORIZONTAL ELLIPSIS}"
    text, colour = line.pop()
    before = sum(font.getlength(piece) for piece, _ in line)
    while text and before + font.getlength(text + mark) > width:
        text = text[:-1].rstrip()
    line.append((text + mark, colour))


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # brings DejaVu along, so that pictures look the same on every machine

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
        axes.plot(
            ranks,
            list(curve),
            marker=marker,
            markersize=4,
            linewidth=2,
            label=f"{_short(name)}  (R@1 {curve[0]:.1f} %)",
        )
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


def _short(name: str) -> str:
    """A name that leaves room for the plot; of a model's path, the end says most."""
    return name if len(name) <= 60 else f"{name[:12]}\N{HORIZONTAL ELLIPSIS}{name[-47:]}"
