"""`fafa-itcpr prepare`: from the downloads of LAST, Celeb-reID and PRCC to the folders that ITCPR's annotation names."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import atomic_path
from tbps_common.images import missing_images
from tbps_common.run.arguments import HelpFormatter

DESCRIPTION = """\
Put the images of ITCPR's three sources into place:

  fafa-itcpr prepare --out ITCPR --annotations DOWNLOADS/ITCPR \\
    --celeb-reid DOWNLOADS/Celeb-reID --prcc DOWNLOADS/prcc --last DOWNLOADS/last

* LAST: every file in a folder whose name is a number goes to LAST/<that name>/;
* Celeb-reID: every .jpg of gallery and query goes to Celeb-reID/<N>/, N = its name up to the first _, three digits;
* PRCC: the folders of rgb (train, val, test) go to PRCC/.

Sources can be given one by one, at different times. Files that are there already with the same size are left alone, so
an interrupted command can be repeated. At the end it checks that all images named by the annotation are there.
"""
MODES = ("copy", "hardlink", "symlink")
ANNOTATIONS = ("query.json", "gallery.json")
PRCC_SUBSETS = ("train", "val", "test")

Placement = tuple[Path, Path]
"""A file, and its place relative to ITCPR's root."""


def main(argv: list[str]) -> int:
    """Parse, find what is to be placed, place it, check."""
    flags = _parse(argv)
    sources: list[tuple[str, str | None, Callable[[Path], Iterator[Placement]]]] = [
        ("--annotations", flags.annotations, annotation_files),
        ("--celeb-reid", flags.celeb_reid, celeb_reid_files),
        ("--prcc", flags.prcc, prcc_files),
        ("--last", flags.last, last_files),
    ]
    out = Path(flags.out)
    if not any(folder for _, folder, _ in sources):
        raise InputError("nothing to prepare: give at least one of --annotations, --celeb-reid, --prcc, --last")
    for flag, folder, _ in sources:
        if folder and not Path(folder).is_dir():
            raise DatasetError(f"{flag} {folder} is not a folder: give the one into which the download was unpacked")
        if folder and out.resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(f"--out {out} lies inside {flag} {folder}: choose a folder outside the downloads")
    for flag, folder, find in sources:
        if folder:
            placements = _distinct(list(find(Path(folder))), flag, folder)
            placed = sum(place(source, out / target, flags.mode) for source, target in placements)
            print(f"{flag}: {placed} files placed, {len(placements) - placed} there already")
    return _check(out)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fafa-itcpr", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("action", choices=["prepare"], help="command")
    parser.add_argument("--out", required=True, help="ITCPR root to write")
    parser.add_argument("--annotations", help="folder of query.json and gallery.json")
    parser.add_argument("--celeb-reid", help="folder of Celeb-reID (with gallery/ and query/ somewhere inside)")
    parser.add_argument("--prcc", help="folder of PRCC (with rgb/ somewhere inside)")
    parser.add_argument("--last", help="folder of LAST")
    parser.add_argument("--mode", choices=MODES, default="copy", help="how files get into place")
    return parser.parse_args(argv)


def annotation_files(folder: Path) -> Iterator[Placement]:
    """`query.json` and `gallery.json`, wherever they lie inside the folder."""
    for name in ANNOTATIONS:
        found = sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
        if not found:
            raise DatasetError(f"--annotations {folder} holds no {name}: download the data set a1557811266/ITCPR")
        yield found[0], Path(name)


def celeb_reid_files(folder: Path) -> Iterator[Placement]:
    """`gallery/12_1_0.jpg` -> `Celeb-reID/012/12_1_0.jpg`."""
    subsets = [path for name in ("gallery", "query") for path in sorted(folder.rglob(name)) if path.is_dir()]
    if not subsets:
        raise DatasetError(f"--celeb-reid {folder} holds no folder gallery or query: give the unpacked Celeb-reID")
    for subset in subsets:
        for source in sorted(subset.iterdir()):
            if source.suffix.lower() == ".jpg" and source.is_file():
                person = source.name.split("_", 1)[0].zfill(3)
                yield source, Path("Celeb-reID", person, source.name)


def prcc_files(folder: Path) -> Iterator[Placement]:
    """`rgb/test/A/001/x.jpg` -> `PRCC/test/A/001/x.jpg`, as the README's tree has it."""
    roots = [path for path in (folder, *sorted(folder.rglob("rgb"))) if path.is_dir() and path.name == "rgb"]
    if not roots and any((folder / name).is_dir() for name in PRCC_SUBSETS):
        roots = [folder]
    if not roots:
        raise DatasetError(f"--prcc {folder} holds no folder rgb: give the unpacked PRCC")
    for source in sorted(roots[0].rglob("*")):
        if source.is_file():
            yield source, Path("PRCC") / source.relative_to(roots[0])


def last_files(folder: Path) -> Iterator[Placement]:
    """`train/000012/x.jpg` -> `LAST/000012/x.jpg`, for every folder whose name consists of digits."""
    found = False
    for current, folders, names in os.walk(folder):
        folders.sort()
        person = os.path.basename(current)
        if person.isascii() and person.isdigit():
            for name in sorted(names):
                found = True
                yield Path(current, name), Path("LAST", person, name)
    if not found:
        raise DatasetError(f"--last {folder} holds no files in folders named by numbers: give the unpacked LAST")


def _distinct(placements: list[Placement], flag: str, folder: str) -> list[Placement]:
    """Refuse two different files for one place; the same place twice with files of one size counts once."""
    chosen: dict[Path, Path] = {}
    for source, target in placements:
        other = chosen.setdefault(target, source)
        if other is not source and other.stat().st_size != source.stat().st_size:
            raise DatasetError(
                f"{flag} {folder}: {other} and {source} both belong to {target} and differ; give only one of their folders"
            )
    return [(source, target) for target, source in chosen.items()]


def place(source: Path, target: Path, mode: str) -> bool:
    """Bring a file into place, whole or not at all; False if it was there already.

    Raises:
        OSError: the target cannot be written.
    """
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return False
    if mode == "copy":
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if mode == "hardlink":
        os.link(source, target)
    else:
        target.symlink_to(source.resolve())
    return True


def _check(out: Path) -> int:
    """Look for the images that the annotation names, once it is there."""
    from tbps_common.datasets import ITCPR

    if not all((out / name).is_file() for name in ANNOTATIONS):
        print(f"{out} has no annotation yet: give --annotations to see whether all images are there")
        return 0
    itcpr = ITCPR(out, verbose=False)
    paths = {*itcpr.query["img_paths"], *itcpr.gallery["img_paths"]}
    missing = missing_images(paths)
    print(f"{len(itcpr.query['img_paths'])} queries, {len(itcpr.gallery['img_paths'])} gallery images")
    if missing:
        by_source = {
            name: sum(os.path.relpath(path, out).split(os.sep)[0] == name for path in missing)
            for name in ("Celeb-reID", "PRCC", "LAST")
        }
        counts = ", ".join(f"{count} of {name}" for name, count in by_source.items() if count)
        print(f"{len(missing)} of {len(paths)} images are missing ({counts}; for example {missing[0]})")
        return 1
    print(f"complete: {len(paths)} images in {out}")
    return 0
