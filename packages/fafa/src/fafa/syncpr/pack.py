"""`fafa-syncpr pack`: the annotation file that FAFA's training reads, out of the pairs that were kept."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fafa.syncpr.records import KEPT, Quadruple, load_pairs, load_quadruples
from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path, write_json
from tbps_common.pipeline.stages import manifest_path
from tbps_common.run.arguments import whole_number

DESCRIPTION = """\
Write SynCPR.json from kept.jsonl; then train with it:

  fafa-syncpr pack --out syncpr --both-directions
  python src/blip_fine_tune_new.py --dataset cpr --syncpr-data-path syncpr --json-path SynCPR.json ...

Each pair gives one triplet (left picture, edit, right picture), with --both-directions a second one from right to left.
Triplets with equal cpr_id are positives of each other in training: --id-by quadruple gives all variants of a quadruple one
id per direction, --id-by image every pair its own.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage, beside `--out`."""
    parser.add_argument("--both-directions", action="store_true", help="also from the right picture to the left one")
    parser.add_argument("--id-by", choices=("quadruple", "image"), default="quadruple", help="what shares a cpr_id")
    parser.add_argument("--json-path", default="SynCPR.json", help="file to write, relative to --out or absolute")
    parser.add_argument(
        "--preview", type=whole_number(0), default=8, help="triplets to show in preview.png; 0: no picture"
    )


def run(flags: argparse.Namespace) -> int:
    """Run the stage; returns the exit status."""
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
    _require_pictures(root, pairs)
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
    pairs: list[dict[str, Any]], quadruples: dict[int, Quadruple], *, both_directions: bool, id_by: str
) -> Iterator[dict[str, Any]]:
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


def _require_pictures(root: Path, pairs: list[dict[str, Any]]) -> None:
    from tbps_common.images import check_images_exist

    check_images_exist(
        (str(root / pair[side]) for pair in pairs for side in ("left", "right")), str(root), flag="--out"
    )


def _preview(root: Path, pairs: list[dict[str, Any]], quadruples: dict[int, Quadruple], count: int) -> None:
    """A picture of some triplets: reference, edit, and the target with its cosine to its caption."""
    from tbps_common.report.pictures import Hit, RankedQuery, ranked_list, spread

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
