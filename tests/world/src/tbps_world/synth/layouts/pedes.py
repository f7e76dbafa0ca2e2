"""CUHK-PEDES, ICFG-PEDES and RSTPReid with their raw annotations, and the processed files made of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tbps_world.synth.captions import MAX_STATED, Caption, write_caption
from tbps_world.synth.layouts.base import Layout, Placed, SeenPictures, records_text
from tbps_world.synth.world import SPLITS, World, camera_of

CUHK, ICFG, RSTP = "CUHK-PEDES", "ICFG-PEDES", "RSTPReid"
CUHK_JSON, ICFG_JSON, RSTP_JSON = f"{CUHK}/reid_raw.json", f"{ICFG}/ICFG-PEDES.json", f"{RSTP}/data_captions.json"

ICFG_SPLITS = ("train", "test")
RSTP_VIEWS = 5

_CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "train_query")
_THIRD_CAPTION_EVERY = 97

Record = dict[str, Any]


def cuhk_name(world: World, split: str, number: int, view: int) -> str:
    """Return the stored name of a picture; people keep to one folder, test people share "test_query"."""
    folder = "test_query" if split == "test" else _CUHK_FOLDERS[number % len(_CUHK_FOLDERS)]
    return f"{folder}/{number + 1:05d}_{view}.{world.settings.image_format}"


def cuhk_caption_count(place: int) -> int:
    """Return the number of captions of the picture at this place of the file: every 97th has a third one."""
    return 3 if place % _THIRD_CAPTION_EVERY == _THIRD_CAPTION_EVERY - 1 else 2


def cuhk_pictures(world: World, *splits: str) -> list[tuple[str, int, int]]:
    """Return (split, number, view) of the pictures of these splits, in file order."""
    return [(split, number, view) for split, number in world.splits(*splits) for view in range(world.settings.views)]


@lru_cache(maxsize=1)
def cuhk_captions(world: World, seen: SeenPictures) -> dict[int, list[Caption]]:
    """Return the captions of every drawn picture, by its place in the file.

    Captions of one picture differ, and one of the first two states type and colour of both garments.
    """
    return {
        place: _captions(world, seen, "cuhk", split, number, view, cuhk_caption_count(place), (12, 45))
        for place, (split, number, view) in enumerate(cuhk_pictures(world, *SPLITS))
        if world.picture(number, view) in seen
    }


def _captions(
    world: World,
    seen: SeenPictures,
    layout: str,
    split: str,
    number: int,
    view: int,
    count: int,
    words: tuple[int, int],
    least_stated: int = 0,
) -> list[Caption]:
    picture = world.picture(number, view)
    facing = camera_of(picture, world.settings.seed).facing
    crowd = world.crowd(split)
    complete = int(world.stream(layout, number, view, "complete caption").integers(2)) if count > 1 else 0
    captions: list[Caption] = []
    attempt = 0
    while len(captions) < count:
        generator = world.stream(layout, number, view, f"caption {len(captions)} attempt {attempt}")
        caption = write_caption(
            picture.person,
            seen[picture],
            facing,
            generator,
            crowd,
            complete=len(captions) == complete,
            words=words,
            least_stated=least_stated,
        )
        attempt += 1
        if all(caption.text != other.text for other in captions):
            captions.append(caption)
            attempt = 0
    return captions


def _place_cuhk(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view), f"{CUHK}/imgs/{cuhk_name(world, split, number, view)}")
        for split, number, view in cuhk_pictures(world, *SPLITS)
    ]


@lru_cache(maxsize=1)
def cuhk_records(world: World, seen: SeenPictures) -> list[Record]:
    """Return the raw annotations of CUHK-PEDES; ids start at 1."""
    captions = cuhk_captions(world, seen)
    return [
        {
            "split": split,
            "captions": [caption.text for caption in captions[place]],
            "file_path": cuhk_name(world, split, number, view),
            "id": number + 1,
        }
        for place, (split, number, view) in enumerate(cuhk_pictures(world, *SPLITS))
    ]


def _icfg_name(world: World, number: int, view: int) -> str:
    # The folders are the source data set's and say nothing about the split.
    return f"{ICFG_SPLITS[number % 2]}/{number:04d}/{number:04d}_{view:03d}.{world.settings.image_format}"


def _icfg_id(world: World, number: int) -> int:
    return number if number < world.settings.train else number - world.settings.val


def _place_icfg(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view), f"{ICFG}/imgs/{_icfg_name(world, number, view)}")
        for _, number, view in cuhk_pictures(world, *ICFG_SPLITS)
    ]


@lru_cache(maxsize=1)
def icfg_records(world: World, seen: SeenPictures) -> list[Record]:
    """Return the raw annotations of ICFG-PEDES: one long caption per picture, no validation split, ids from 0."""
    return [
        {
            "split": split,
            "captions": [
                caption.text for caption in _captions(world, seen, "icfg", split, number, view, 1, (30, 50), MAX_STATED)
            ],
            "file_path": _icfg_name(world, number, view),
            "id": _icfg_id(world, number),
        }
        for split, number, view in cuhk_pictures(world, *ICFG_SPLITS)
    ]


def _rstp_pictures(world: World) -> list[tuple[str, int, int]]:
    return [(split, number, view) for split, number in world.splits(*SPLITS) for view in range(RSTP_VIEWS)]


def _rstp_name(world: World, number: int, view: int) -> str:
    return f"{number:04d}_c{view}_{view:04d}.{world.settings.image_format}"


def _place_rstp(world: World) -> list[Placed]:
    return [
        Placed(world.picture(number, view), f"{RSTP}/imgs/{_rstp_name(world, number, view)}")
        for _, number, view in _rstp_pictures(world)
    ]


@lru_cache(maxsize=1)
def rstp_records(world: World, seen: SeenPictures) -> list[Record]:
    """Return the raw annotations of RSTPReid: five pictures per person, two captions of at least 23 words each."""
    return [
        {
            "id": number,
            "img_path": _rstp_name(world, number, view),
            "captions": [
                caption.text for caption in _captions(world, seen, "rstp", split, number, view, 2, (23, 45), 8)
            ],
            "split": split,
        }
        for split, number, view in _rstp_pictures(world)
    ]


def processed_files(short: str, records: Sequence[Record], image_key: str, splits: Sequence[str]) -> dict[str, str]:
    """Return the processed fine-tune files of raw records.

    Training files hold one object per caption, evaluation files one per image.
    """
    files = {}
    for split in splits:
        chosen = [record for record in records if record["split"] == split]
        if split == "train":
            rows = [
                {"image": record[image_key], "caption": caption, "image_id": record["id"]}
                for record in chosen
                for caption in record["captions"]
            ]
        else:
            rows = [
                {"image": record[image_key], "caption": record["captions"], "image_id": record["id"]}
                for record in chosen
            ]
        files[f"data/finetune/{short}_{split}.json"] = records_text(rows)
    return files


def _finetune_files(world: World, seen: SeenPictures) -> dict[str, str]:
    return {
        **processed_files("cuhk", cuhk_records(world, seen), "file_path", SPLITS),
        **processed_files("icfg", icfg_records(world, seen), "file_path", ICFG_SPLITS),
        **processed_files("rstp", rstp_records(world, seen), "img_path", SPLITS),
    }


CUHK_LAYOUT = Layout(
    "cuhk", (CUHK,), _place_cuhk, lambda world, seen: {CUHK_JSON: records_text(cuhk_records(world, seen))}
)
ICFG_LAYOUT = Layout(
    "icfg", (ICFG,), _place_icfg, lambda world, seen: {ICFG_JSON: records_text(icfg_records(world, seen))}
)
RSTP_LAYOUT = Layout(
    "rstp", (RSTP,), _place_rstp, lambda world, seen: {RSTP_JSON: records_text(rstp_records(world, seen))}
)
FINETUNE_LAYOUT = Layout(
    "finetune",
    ("data/finetune", f"images/{CUHK}", f"images/{ICFG}", f"images/{RSTP}"),
    lambda world: [],
    _finetune_files,
    links=(
        (f"images/{CUHK}/imgs", f"{CUHK}/imgs"),
        (f"images/{ICFG}", f"{ICFG}/imgs"),
        (f"images/{RSTP}", f"{RSTP}/imgs"),
    ),
    needs=("cuhk", "icfg", "rstp"),
)
