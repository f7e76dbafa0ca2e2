"""Pictures at a glance: lines of images, each with its caption below."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tbps_common.files import atomic_path

_HEIGHT, _GAP, _TEXT, _WIDTH = 144, 6, 15, 640

Words = tuple[str, str]
"""A piece of text, and its colour as Pillow names it."""


@dataclass(frozen=True)
class SheetLine:
    """One line.

    Attributes:
        pictures: from left to right, each with the words above it.
        caption: below them.
    """

    pictures: Sequence[tuple[str, Image.Image]]
    caption: Sequence[Words]


def write_contact_sheet(path: Path, lines: Sequence[SheetLine]) -> None:
    """Write one PNG.

    Raises:
        OSError: the file cannot be written.
    """
    font = ImageFont.load_default(11)
    drawn = [_draw(line, font) for line in lines]
    sheet = Image.new("RGB", (max(line.width for line in drawn), sum(line.height for line in drawn)), "white")
    top = 0
    for line in drawn:
        sheet.paste(line, (0, top))
        top += line.height
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _draw(line: SheetLine, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    scaled = [(name, _scaled(image)) for name, image in line.pictures]
    widths = [max(image.width, round(font.getlength(name))) for name, image in scaled]
    width = max(sum(widths) + _GAP * (len(widths) + 1), _WIDTH)
    rows = list(_wrapped(line.caption, font, width - 2 * _GAP))
    picture = Image.new("RGB", (width, _GAP + _TEXT + _HEIGHT + _TEXT * len(rows) + 2 * _GAP), "white")
    pen = ImageDraw.Draw(picture)
    left = _GAP
    for (name, image), column in zip(scaled, widths):
        pen.text((left, _GAP), name, "grey", font=font)
        picture.paste(image, (left, _GAP + _TEXT))
        left += column + _GAP
    for number, row in enumerate(rows):
        left = float(_GAP)
        for text, colour in row:
            pen.text((left, _GAP + _TEXT + _HEIGHT + 1 + number * _TEXT), text, colour, font=font)
            left += font.getlength(text)
    return picture


def _scaled(image: Image.Image) -> Image.Image:
    """To the line's height; wide images to no more than twice that width."""
    factor = min(_HEIGHT / image.height, 2 * _HEIGHT / image.width)
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def _wrapped(
    caption: Sequence[Words], font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> Iterator[list[Words]]:
    """The caption in rows that are no wider than `width` pixels, broken between words."""
    row: list[Words] = []
    filled = 0.0
    for text, colour in caption:
        for word in re.findall(r"\s+|\S+", text):
            shown = word if word.strip() else " "
            length = font.getlength(shown)
            if row and filled + length > width:
                yield row
                row, filled = [], 0.0
            if row or word.strip():
                row.append((shown, colour))
                filled += length
    if row:
        yield row
