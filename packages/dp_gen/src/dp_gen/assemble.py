"""`dp-pack`: generated images and their captions as a data set that retrieval models train on."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tbps_common.datasets import CUHKPEDES, Folder
from tbps_common.datasets.finetune import one_record_per_line
from tbps_common.errors import DatasetError, InputError
from tbps_common.files import write_text
from tbps_common.pipeline.journal import read_json_lines
from tbps_common.run.arguments import HelpFormatter
from tbps_common.run.command import command

DESCRIPTION = """\
Join generated images with their captions into a data set of the layout of CUHK-PEDES, alone or added to one.

  dp-pack --generated edits --annotations annotations.jsonl --base {DATA_ROOT} --out packed

--generated is the --out folder of generate.py; --annotations what annotate.py made of its edits.jsonl. The result is
OUT/CUHK-PEDES/reid_raw.json with OUT/CUHK-PEDES/imgs, which `cmlfa-train --root_dir OUT` reads. For MRA:

  tbps-data convert --dataset CUHK-PEDES --root_dir packed --to finetune --out data/finetune --link_images images

With --base the images and records of DATA_ROOT/CUHK-PEDES come first, unchanged.
"""

NAME, GENERATED = "CUHK-PEDES", "generated"


@command
def main(argv: list[str]) -> int:
    """Write the data set; returns the exit status."""
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if (out / NAME).exists():
        raise InputError(f"{out / NAME} exists already: remove it, or choose another --out")
    rows = _manifest(Path(args.generated))
    captions, left_out = _captions(rows, args.annotations, args.captions)
    base = _base_records(args.base) if args.base else []
    records = _records(rows, captions, base, new_ids=args.new_ids)
    if not records:
        raise InputError(
            f"no image of {args.generated} has a caption in {args.annotations}: annotate its edits.jsonl, or take the "
            "captions of generation with --captions own"
        )
    _write(out, base, records, args)
    persons = len({record["id"] for record, _ in records})
    print(f"{out / NAME}: {len(records)} generated images of {persons} persons added to {len(base)} images")
    if left_out:
        print(f"{left_out} images have no caption and are left out: annotate them and pack again")
    return 0


def _manifest(folder: Path) -> list[dict[str, Any]]:
    """Rows of edits.jsonl, in order.

    Raises:
        DatasetError: it is missing, or a row or image cannot be used.
    """
    path = folder / "edits.jsonl"
    inside = Folder(folder)
    rows = []
    for number, row in read_json_lines(path):
        if isinstance(row, str) or not isinstance(row.get("file"), str):
            raise DatasetError(f"{path}:{number + 1}: {row if isinstance(row, str) else 'there is no file name'}")
        problem = inside.problem(row["file"])
        if problem is not None:
            raise DatasetError(f"{path}:{number + 1}: the file {row['file']!r} {problem}")
        if not (folder / row["file"]).is_file():
            raise DatasetError(
                f"{path}:{number + 1}: the image {folder / row['file']} does not exist: generate it again"
            )
        rows.append({**row, "index": number})
    if not rows:
        raise DatasetError(f"{path} lists no images: run generate.py first")
    return rows


def _captions(rows: list[dict[str, Any]], annotations: str | None, source: str) -> tuple[dict[str, str], int]:
    """Caption of each file, and how many files have none."""
    captions: dict[str, str] = {}
    if source == "own":
        captions = {row["file"]: row["caption"] for row in rows if isinstance(row.get("caption"), str)}
    elif annotations is None:
        raise InputError("--annotations is missing: name what annotate.py wrote, or use --captions own")
    else:
        captions = _annotated(rows, annotations)
    captions = {file: text for file, text in captions.items() if text.strip()}
    return captions, len(rows) - len(captions)


def _annotated(rows: list[dict[str, Any]], annotations: str) -> dict[str, str]:
    """Annotations carry the manifest's own fields, so that their file names find them."""
    known = {row["file"]: row for row in rows}
    captions = {}
    for number, row in read_json_lines(annotations):
        if isinstance(row, str):
            print(f"{annotations}:{number + 1}: {row}; this row is left out", file=sys.stderr)
            continue
        file, text = row.get("file"), row.get("output")
        if not isinstance(text, str) or file not in known:
            continue
        if row.get("base_description") != known[file].get("base_description"):
            raise DatasetError(
                f"{annotations}:{number + 1} belongs to another edits.jsonl (its original caption of {file} differs): "
                "annotate this one"
            )
        captions[file] = text
    return captions


def _base_records(root: str) -> list[dict[str, Any]]:
    """All records of the data set to add to, as stored.

    Raises:
        DatasetError: it cannot be used.
    """
    data = CUHKPEDES(root, verbose=False)
    return [*data.train_annos, *data.val_annos, *data.test_annos]


def _records(
    rows: list[dict[str, Any]], captions: dict[str, str], base: list[dict[str, Any]], *, new_ids: bool
) -> list[tuple[dict[str, Any], str]]:
    """Training records of the generated images, each with the file that it was made as.

    An edit keeps its source's person, unless `new_ids` or that person is not trained on in the base. All copies of a
    description are one new person. New persons get the whole numbers after all known ones.
    """
    persons = [row["person"] for row in rows if isinstance(row.get("person"), int)]
    following = max([*(int(record["id"]) for record in base), *persons], default=0) + 1
    trained = {int(record["id"]) for record in base if record["split"] == "train"}
    ids: dict[Any, int] = {}
    records = []
    for row in rows:
        if row["file"] not in captions:
            continue
        person = row.get("person")
        if isinstance(person, int) and not new_ids and (person in trained or not base):
            number = person
        else:
            key = _person_key(row, new_ids=new_ids)
            if key not in ids:
                ids[key], following = following, following + 1
            number = ids[key]
        path = f"{GENERATED}/{Path(row['file']).name}"
        record = {"split": "train", "captions": [captions[row["file"]]], "file_path": path, "id": number}
        records.append((record, row["file"]))
    return records


def _person_key(row: dict[str, Any], *, new_ids: bool) -> Any:
    if row.get("kind") == "new":
        return ("new", row.get("description_number"))
    if not new_ids and isinstance(row.get("person"), int):
        return ("person", row["person"])
    return ("edit", row["file"])


def _write(
    out: Path, base: list[dict[str, Any]], records: list[tuple[dict[str, Any], str]], args: argparse.Namespace
) -> None:
    """Everything under another name first, so that a part is never taken for the whole."""
    part = out / f".{NAME}.tmp{os.getpid()}"
    for left in out.glob(f".{NAME}.tmp*"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    try:
        images = part / "imgs"
        images.mkdir(parents=True)
        if base:
            _add_base_images(Path(args.base) / NAME / "imgs", images, copy=args.copy_base)
        (images / GENERATED).mkdir()
        for record, file in records:
            shutil.copyfile(Path(args.generated, file), images / record["file_path"])
        everything = [*base, *(record for record, _ in records)]
        write_text(part / "reid_raw.json", one_record_per_line(everything))
        os.replace(part, out / NAME)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _add_base_images(source: Path, target: Path, *, copy: bool) -> None:
    if (source / GENERATED).exists():
        raise InputError(f"{source} has a folder {GENERATED} already: pack onto the original data set")
    for entry in sorted(source.iterdir()):
        if copy:
            (shutil.copytree if entry.is_dir() else shutil.copyfile)(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())


def build_parser() -> argparse.ArgumentParser:
    """The flags of `dp-pack`."""
    parser = argparse.ArgumentParser(
        prog="dp-pack", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--generated", required=True, help="folder that generate.py wrote")
    parser.add_argument("--annotations", help="JSON lines that annotate.py wrote")
    parser.add_argument("--out", required=True, help="root of the new data set")
    parser.add_argument("--base", help="root of the data set to add to; it holds the folder CUHK-PEDES")
    parser.add_argument(
        "--captions",
        choices=("annotated", "own"),
        default="annotated",
        help="captions of --annotations, or those that the images were generated from",
    )
    parser.add_argument("--new_ids", action="store_true", help="give every edit its own person id")
    parser.add_argument("--copy_base", action="store_true", help="copy the base's images instead of linking them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
