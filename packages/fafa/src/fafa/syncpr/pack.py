"""`fafa-syncpr pack`: the annotation file that FAFA's training reads, out of the pairs that were kept."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from fafa.syncpr.records import KEPT, Quadruple, load_pairs, load_quadruples
from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path, write_json
from tbps_common.images import check_images_exist
from tbps_common.pipeline import Record, manifest_path
from tbps_common.report.pictures import Hit, RankedQuery, ranked_list, spread


def main(flags: argparse.Namespace) -> int:
    """Write the file; returns the exit status.

    Raises:
        InputError: nothing was kept, or a record or picture cannot be used.
    """
    root = Path(flags.out)
    quadruples, _ = load_quadruples(root)
    pairs = load_pairs(root, KEPT)
    if not pairs:
        raise InputError(
            f"{root}: no pair was kept: lower the thresholds of fafa-syncpr filter (nothing is computed or asked again)"
        )
    for pair in pairs:
        if pair["quadruple_id"] not in quadruples:
            raise DatasetError(f"{root}: kept.jsonl has a picture of quadruple {pair['quadruple_id']}, which is gone")
    pictures = (str(root / pair[side]) for pair in pairs for side in ("left", "right"))
    check_images_exist(pictures, str(root), flag="--out")
    output = root / flags.json_path
    count, ids = 0, 0
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for triplet in triplets(pairs, quadruples, both_directions=flags.both_directions, id_by=flags.id_by):
            file.write(("[\n" if count == 0 else ",\n") + json.dumps(triplet, ensure_ascii=False))
            count, ids = count + 1, max(ids, triplet["cpr_id"] + 1)
        file.write("\n]\n")
    settings = {name: getattr(flags, name) for name in ("both_directions", "id_by")}
    counts = {"pairs": len(pairs), "triplets": count, "ids": ids}
    write_json(manifest_path(output), {"command": "fafa-syncpr pack", "settings": settings, **counts})
    print(f"{output}: {count} triplets of {len(pairs)} pairs, {ids} ids")
    if flags.preview:
        _preview(root, pairs, quadruples, flags.preview)
    return 0


def triplets(
    pairs: list[Record], quadruples: dict[int, Quadruple], *, both_directions: bool, id_by: str
) -> Iterator[Record]:
    """The annotation's records; ids count from 0 in the order of the records.

    The two directions of a pair never share an id: their targets look different.
    """
    ids: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        text = quadruples[pair["quadruple_id"]]
        for direction in (0, 1) if both_directions else (0,):
            group = (pair["quadruple_id"], *((pair["variant"],) if id_by == "image" else ()), direction)
            captions, paths = [text.caption_1, text.caption_2], [pair["left"], pair["right"]]
            if direction:
                captions.reverse()
                paths.reverse()
            yield {
                "reference_caption": captions[0],
                "target_caption": captions[1],
                "reference_image_path": paths[0],
                "target_image_path": paths[1],
                "edit_caption": text.edit_2_to_1 if direction else text.edit_1_to_2,
                "cpr_id": ids.setdefault(group, len(ids)),
            }


def _preview(root: Path, pairs: list[Record], quadruples: dict[int, Quadruple], count: int) -> None:
    """A picture of some triplets: reference, edit, and the target with its cosine to its caption."""
    shown = [pairs[place] for place in spread(range(len(pairs)), count)]
    rows = [
        RankedQuery(
            text=quadruples[pair["quadruple_id"]].edit_1_to_2,
            image=root / pair["left"],
            hits=[Hit(root / pair["right"], pair.get("clip_right", 0.0))],
        )
        for pair in shown
    ]
    ranked_list(root / "preview.png", rows)
    print(f"{root / 'preview.png'}: {len(rows)} of them")
