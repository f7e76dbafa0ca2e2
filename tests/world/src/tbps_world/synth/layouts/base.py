"""What a layout is: pictures with their places, and annotation files written once the pictures have been seen."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tbps_world.synth.drawing import Seen
from tbps_world.synth.world import Picture, World


@dataclass(eq=False)
class SeenPictures:
    """What every drawn picture shows. Compared by identity, so that what follows from it can be cached."""

    by_key: Mapping[tuple[str, str, int], Seen]

    def __getitem__(self, picture: Picture) -> Seen:
        return self.by_key[picture.key]

    def __contains__(self, picture: Picture) -> bool:
        return picture.key in self.by_key


@dataclass(frozen=True)
class Mask:
    """A `.npy` file of a picture's parts.

    Attributes:
        path: the file, relative to the world's folder.
        values: value to write for each part number, in the order of `body.PARTS`.
    """

    path: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A picture and where it goes, relative to the world's folder.

    Attributes:
        picture: what to draw.
        path: the image file.
        mask: the file of its parts, for layouts that have one.
    """

    picture: Picture
    path: str
    mask: Mask | None = None


@dataclass(frozen=True)
class Layout:
    """One data-set layout.

    Attributes:
        name: as given to `--layouts`.
        folders: the folders this layout owns, relative to the world's folder.
        place: all pictures of the layout, in a fixed order.
        annotate: path and text of every annotation file.
        links: folders (first) that show the files of another one (second), relative to the world's folder.
        needs: layouts that must be written too.
    """

    name: str
    folders: tuple[str, ...]
    place: Callable[[World], list[Placed]]
    annotate: Callable[[World, SeenPictures], dict[str, str]]
    links: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()


def records_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a JSON list with one record per line."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"
