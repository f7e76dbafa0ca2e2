"""A picture of the world at a glance: one column per person, one row per view."""

from pathlib import Path

import numpy as np
from PIL import Image

from tbps_common.files import atomic_path
from tbps_world.synth.world import Settings, World, draw_picture

_GAP = 2
_STEP = 12


def write_contact_sheet(path: Path, settings: Settings, people: int = 10, views: int = 4) -> None:
    """Write the first people of a world as one PNG.

    Args:
        path: the file.
        settings: of the world.
        people: number of columns, at most the people of the world.
        views: number of rows.
    """
    world = World(settings)
    people = min(people, settings.people)
    height, width = settings.height + _GAP, settings.width + _GAP
    sheet = np.full((views * height + _GAP, people * width + _GAP, 3), 255, dtype=np.uint8)
    for number in range(people):
        for view in range(views):
            top, left = view * height + _GAP, number * width + _GAP
            drawing = draw_picture(world.picture(number, view), settings)
            sheet[top : top + settings.height, left : left + settings.width] = drawing.picture
    # Camera noise does not compress; coarser steps keep the file small enough for a repository.
    coarse = ((sheet.astype(np.int32) + _STEP // 2) // _STEP * _STEP).clip(0, 255).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(coarse).save(temporary, format="PNG", optimize=True)
