"""SynCPR and ITCPR: a reference picture, words about what is new, and pictures of the person in the new outfit."""

from dataclasses import dataclass
from typing import Any

from tbps_world.synth.captions import write_caption
from tbps_world.synth.edits import change_outfit, redress, write_edit
from tbps_world.synth.layouts.base import Layout, Placed, SeenPictures, records_text
from tbps_world.synth.world import Picture, World, camera_of

_PAIRS_PER_CHANGE = 2
_DISTRACTOR = -1
_OTHERS_VIEWS = 2
_CHANGE_VIEWS = (0, 1, 2)
"""Front, back and right: everything that can change is on show there."""


@dataclass(frozen=True)
class _Pair:
    """One SynCPR record: the same person before and after a change of outfit."""

    change: int
    number: int
    reference: Picture
    target: Picture
    changed: tuple[str, ...]


def _pairs(world: World) -> list[_Pair]:
    pairs = []
    for change, number in enumerate(world.numbers("train")):
        person = world.people[number]
        dressed, changed = change_outfit(person, world.stream("syncpr", number, 0, "change"))
        for place in range(_PAIRS_PER_CHANGE):
            generator = world.stream("syncpr", number, place, "views")
            view = int(generator.integers(4))
            target_view = _CHANGE_VIEWS[int(generator.integers(len(_CHANGE_VIEWS)))]
            reference = Picture("syncpr", f"{number}-{place}-left", view, person, may_be_hidden=False)
            target = Picture("syncpr", f"{number}-{place}-right", target_view, dressed, may_be_hidden=False)
            pairs.append(_Pair(change, number, reference, target, changed))
    return pairs


def _pair_name(world: World, record: int, side: str) -> str:
    return f"test1/sub_img/img_{side}/{record}-1_{side}.{world.settings.image_format}"


def _place_syncpr(world: World) -> list[Placed]:
    placed = []
    for record, pair in enumerate(_pairs(world)):
        placed.append(Placed(pair.reference, f"SynCPR/{_pair_name(world, record, 'left')}"))
        placed.append(Placed(pair.target, f"SynCPR/{_pair_name(world, record, 'right')}"))
    return placed


def _syncpr_files(world: World, seen: SeenPictures) -> dict[str, str]:
    records = []
    for record, pair in enumerate(_pairs(world)):
        generator = world.stream("syncpr", record, 0, "words")
        full = [
            write_caption(
                picture.person,
                seen[picture],
                camera_of(picture, world.settings.seed).facing,
                generator,
                world.crowd("train"),
            ).text
            for picture in (pair.reference, pair.target)
        ]
        records.append(
            {
                "reference_caption": full[0],
                "target_caption": full[1],
                "reference_image_path": _pair_name(world, record, "left"),
                "target_image_path": _pair_name(world, record, "right"),
                "edit_caption": write_edit(pair.target.person, pair.changed, generator),
                "cpr_id": pair.change,
            }
        )
    return {"SynCPR/SynCPR.json": records_text(records)}


@dataclass(frozen=True)
class _Item:
    """One ITCPR picture."""

    picture: Picture
    path: str
    source: str
    person_id: int
    instance_id: int


def _items(world: World) -> tuple[list[_Item], list[_Item], list[tuple[str, ...]]]:
    """Return queries, gallery, and the changed groups of each query."""
    queries: list[_Item] = []
    gallery: list[_Item] = []
    changes: list[tuple[str, ...]] = []

    def item(name: str, view: int, person: Any, number: int, instance: int, *, query: bool, source: str) -> None:
        items = queries if query else gallery
        place = len(queries) + len(gallery)
        path = _source_path(source, number, place, world.settings.image_format, query=query)
        picture = Picture("itcpr", name, view, person, may_be_hidden=False)
        items.append(_Item(picture, path, source, number + 1, instance))

    for query, number in enumerate(world.numbers("test")):
        generator = world.stream("itcpr", number, 0, "outfits")
        person, instance, source = world.people[number], query + 1, _source(query)
        target, changed = change_outfit(person, generator)
        changes.append(changed)
        item(f"{instance}-query", (0, 2)[query % 2], person, number, instance, query=True, source=source)
        first, positives = int(generator.integers(3)), 1 + int(generator.integers(3))
        for place in range(positives):
            view = _CHANGE_VIEWS[(first + place) % len(_CHANGE_VIEWS)]
            item(f"{instance}-gallery-{place}", view, target, number, instance, query=False, source=source)
        if query % 2 == 0:
            wrong, view = redress(target, changed, generator), int(generator.integers(3))
            item(f"{instance}-wrong", view, wrong, number, _DISTRACTOR, query=False, source=source)
    for place, number in enumerate(world.numbers("val")):
        for view in range(_OTHERS_VIEWS):
            person = world.people[number]
            item(f"other-{number}-{view}", view, person, number, _DISTRACTOR, query=False, source=_source(place))
    return queries, gallery, changes


def _source(place: int) -> str:
    return "Celeb-reID" if place % 10 < 5 else "PRCC" if place % 10 < 6 else "LAST"


def _source_path(source: str, number: int, place: int, image_format: str, *, query: bool) -> str:
    """Return the path in the manner of the source data set; the running number makes it unique."""
    if source == "Celeb-reID":
        return f"{source}/{number + 1:03d}/{number + 1}_{place}_0.{image_format}"
    if source == "PRCC":
        return f"{source}/rgb/test/{'A' if query else 'B'}/{number + 1:03d}/cropped_rgb{place:03d}.{image_format}"
    return f"{source}/{number + 1:06d}/{number + 1:06d}_{place:05d}.{image_format}"


def _place_itcpr(world: World) -> list[Placed]:
    queries, gallery, _ = _items(world)
    return [Placed(item.picture, f"ITCPR/{item.path}") for item in (*queries, *gallery)]


def _itcpr_record(item: _Item) -> dict[str, Any]:
    return {
        "file_path": item.path,
        "datasets": item.source,
        "person_id": item.person_id,
        "instance_id": item.instance_id,
    }


def _itcpr_files(world: World, seen: SeenPictures) -> dict[str, str]:
    queries, gallery, changes = _items(world)
    targets: dict[int, Picture] = {}
    for item in gallery:
        targets.setdefault(item.instance_id, item.picture)
    records = []
    for item, changed in zip(queries, changes):
        generator = world.stream("itcpr", item.person_id - 1, 0, "words")
        target = targets[item.instance_id].person
        records.append({**_itcpr_record(item), "caption": write_edit(target, changed, generator)})
    return {
        "ITCPR/query.json": records_text(records),
        "ITCPR/gallery.json": records_text(_itcpr_record(item) for item in gallery),
    }


SYNCPR_LAYOUT = Layout("syncpr", ("SynCPR",), _place_syncpr, _syncpr_files)
ITCPR_LAYOUT = Layout("itcpr", ("ITCPR",), _place_itcpr, _itcpr_files)
