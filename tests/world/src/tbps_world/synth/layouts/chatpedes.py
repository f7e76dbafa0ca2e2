"""ChatPedes: dialogues about the pictures of CUHK-PEDES."""

from typing import Any

from tbps_world.synth.dialogues import write_dialogue
from tbps_world.synth.layouts.base import Layout, Placed, SeenPictures, records_text
from tbps_world.synth.layouts.pedes import cuhk_name, cuhk_pictures
from tbps_world.synth.world import World

CHAT_SPLITS = ("train", "test")
_TWO_DIALOGUES_PERCENT = 20


def _place(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view), f"ChatPedes/imgs/{cuhk_name(world, split, number, view)}")
        for split, number, view in cuhk_pictures(world, *CHAT_SPLITS)
    ]


def _record(world: World, seen: SeenPictures, split: str, number: int, view: int) -> dict[str, Any]:
    """One dialogue as a list of turns; in a fifth of the records a list of two dialogues."""
    picture = world.picture(number, view)
    generator = world.stream("chatpedes", number, view, "dialogue")
    several = int(generator.integers(100)) < _TWO_DIALOGUES_PERCENT
    first = write_dialogue(picture.person, seen[picture], generator)
    return {
        "id": number + 1,
        "file_path": cuhk_name(world, split, number, view),
        "chats": [first, write_dialogue(picture.person, seen[picture], generator)] if several else first,
    }


def _files(world: World, seen: SeenPictures) -> dict[str, str]:
    return {
        f"ChatPedes/{split}_reid.json": records_text(
            _record(world, seen, split, number, view) for _, number, view in cuhk_pictures(world, split)
        )
        for split in CHAT_SPLITS
    }


CHATPEDES_LAYOUT = Layout("chatpedes", ("ChatPedes",), _place, _files)
