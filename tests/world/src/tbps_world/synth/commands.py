"""The command line of `tbps-synth`."""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tbps_common.errors import InputError

if TYPE_CHECKING:
    from tbps_world.synth.world import Settings

_MOST_WORKERS = 8


def parser() -> argparse.ArgumentParser:
    """Return the parser of `tbps-synth`."""
    result = argparse.ArgumentParser(
        prog="tbps-synth",
        description="Draw synthetic pedestrians and write them in the layout of every data set the papers use.",
        allow_abbrev=False,
        epilog="Example: tbps-synth --out toy --preset small --layouts cuhk",
    )
    result.add_argument("--out", metavar="DIR", help="folder of the world (created if missing)")
    result.add_argument(
        "--preset",
        choices=("tiny", "small", "medium"),
        default="small",
        help="tiny: 24/8/12 train/val/test ids, 96x48; small: 400/50/100, 128x64 (default); medium: 4000/200/400, 256x128",
    )
    result.add_argument(
        "--layouts",
        default="all",
        help="comma-separated: cuhk,icfg,rstp,finetune,sda,syncpr,itcpr,chatpedes,mals,dp (default: all)",
    )
    result.add_argument("--ids", type=int, metavar="N", help="identities in all, split like the preset's")
    result.add_argument("--views", type=int, metavar="V", help="pictures per identity, at least 2 (front and back)")
    result.add_argument("--height", type=int, metavar="PIXELS", help="height of the pictures; they are half as wide")
    result.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    result.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, _MOST_WORKERS), help="worker processes")
    result.add_argument("--format", choices=("png", "jpg"), default="png", help="image files (default: png)")
    result.add_argument("--force", action="store_true", help="draw again, and replace another world in DIR")
    result.add_argument(
        "--contact_sheet", metavar="FILE", help="only write a picture of the world's first 10 people in 4 views (PNG)"
    )
    return result


def main(argv: list[str]) -> int:
    """Run `tbps-synth`; return the exit status.

    Raises:
        InputError: a flag or the output folder cannot be used.
    """
    arguments = parser().parse_args(argv)
    settings, names = _settings(arguments)
    if arguments.contact_sheet is not None:
        from tbps_world.synth.contact_sheet import write_contact_sheet

        write_contact_sheet(Path(arguments.contact_sheet), settings)
        print(f"written to {arguments.contact_sheet}")
        return 0
    if arguments.out is None:
        raise InputError("--out DIR is missing: name the folder to write the world into.")
    from tqdm import tqdm

    from tbps_world.synth.generate import MANIFEST, generate

    started = time.monotonic()
    out = Path(arguments.out)
    with tqdm(desc="drawing", unit="picture", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        manifest, drawn = generate(
            out,
            settings,
            names,
            workers=arguments.workers,
            force=arguments.force,
            progress=bar.update,
            announce=bar.reset,
        )
    for name, summary in manifest["layouts"].items():
        print(f"{name:10s} {summary['images']:7d} images {summary['files']:6d} annotation files")
    if drawn:
        print(f"written to {out} in {time.monotonic() - started:.1f} s; checksums in {out / MANIFEST}")
    else:
        print(f"already there: {out} (give --force to draw it again)")
    return 0


def _settings(arguments: argparse.Namespace) -> "tuple[Settings, list[str]]":
    """Turn the flags into settings and layout names.

    Raises:
        InputError: a value is out of range.
    """
    from tbps_world.synth.layouts.registry import LAYOUTS
    from tbps_world.synth.world import PRESETS, resized

    for flag, value, least, most in (
        ("--views", arguments.views, 2, 1000),
        ("--height", arguments.height, 64, 1024),
        ("--workers", arguments.workers, 1, 1024),
    ):
        if value is not None and not least <= value <= most:
            raise InputError(f"{flag} {value} is out of range: give {least} to {most}.")
    if arguments.height is not None and arguments.height % 2:
        raise InputError(f"--height {arguments.height} is odd: pictures are half as wide as high, give an even number.")
    settings = replace(PRESETS[arguments.preset], seed=arguments.seed, image_format=arguments.format)
    if arguments.ids is not None:
        settings = resized(settings, arguments.ids)
    if arguments.views is not None:
        settings = replace(settings, views=arguments.views)
    if arguments.height is not None:
        settings = replace(settings, height=arguments.height)
    names = list(LAYOUTS) if arguments.layouts == "all" else [name for name in arguments.layouts.split(",") if name]
    if not names:
        raise InputError("--layouts names no layout: give some, or all.")
    return settings, names
