"""The Diverse-Person folder: per (picture, caption) an image, a mask of three garment classes, and their phrases."""

import json

from tbps_world.synth.body import HAIR_PART, LOWER, PARTS, UPPER
from tbps_world.synth.captions import Caption
from tbps_world.synth.layouts.base import Layout, Mask, Placed, SeenPictures
from tbps_world.synth.layouts.pedes import cuhk_caption_count, cuhk_captions, cuhk_pictures
from tbps_world.synth.world import SPLITS, World

DIVERSE_SPLITS = ("train", "test")
SEGMENTS = (("hair", "hair"), ("upper", "uppercloth"), ("lower", "bottomcloth"))
"""Group of a phrase and label of its segment; the position, from 1, is the segment's value in the mask."""

MASK_VALUES = tuple({HAIR_PART: 1, UPPER: 2, LOWER: 3}.get(part, 0) for part in range(len(PARTS)))
"""Value in the mask of each part; parts that have no segment become 0."""


def _samples(world: World) -> list[tuple[int, int, str, int, int, int]]:
    """Return (id, place, split, number, view, caption) of all samples of the kept splits.

    Captions are those of CUHK-PEDES; place is the picture's place in that file.
    """
    samples = []
    for place, (split, number, view) in enumerate(cuhk_pictures(world, *SPLITS)):
        if split in DIVERSE_SPLITS:
            for caption in range(cuhk_caption_count(place)):
                samples.append((len(samples), place, split, number, view, caption))
    return samples


def _stem(sample: int) -> str:
    name = f"{sample:09d}"
    return f"dp/{name[:5]}/{name}"


def _place(world: World) -> list[Placed]:
    return [
        Placed(
            world.picture(number, view),
            f"{_stem(sample)}.{world.settings.image_format}",
            Mask(f"{_stem(sample)}.npy", MASK_VALUES),
        )
        for sample, _, _, number, view, _ in _samples(world)
    ]


def _files(world: World, seen: SeenPictures) -> dict[str, str]:
    files: dict[str, str] = {}
    ids: dict[str, list[str]] = {split: [] for split in DIVERSE_SPLITS}
    captions = cuhk_captions(world, seen)
    for sample, place, split, number, view, caption in _samples(world):
        ids[split].append(f"{sample:09d}")
        boxes = seen[world.picture(number, view)].boxes
        files[f"{_stem(sample)}.json"] = _sample_text(world, captions[place][caption], boxes)
    files["dp/img_ids.txt"] = "".join(f"{name}\n" for split in DIVERSE_SPLITS for name in ids[split])
    files.update({f"dp/img_ids_{split}.txt": "".join(f"{name}\n" for name in ids[split]) for split in DIVERSE_SPLITS})
    return files


def _sample_text(world: World, caption: Caption, boxes: dict[str, tuple[int, int, int, int]]) -> str:
    segments = []
    for value, (group, label) in enumerate(SEGMENTS, start=1):
        if group in caption.phrases and group in boxes:
            start, end = caption.span(group)
            segments.append(
                {
                    "id": value,
                    "label": label,
                    "bbox": list(boxes[group]),
                    "start": start,
                    "end": end,
                    "phrase": caption.text[start:end],
                }
            )
    sample = {
        "description": caption.text,
        "width": world.settings.width,
        "height": world.settings.height,
        "segments": segments,
    }
    return json.dumps(sample, ensure_ascii=False) + "\n"


DIVERSE_LAYOUT = Layout("dp", ("dp",), _place, _files)
