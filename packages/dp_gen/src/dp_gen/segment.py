"""`segment.py`, `dp-segment`: make a training folder from a data set's images and captions."""

import argparse
import sys
from pathlib import Path

from tbps_common.errors import InputError
from tbps_common.pipeline.stages import add_shard_flags
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_common.run.command import command

DESCRIPTION = """\
Make the training folder of train.py from images with captions: find the regions of hair, upper and lower clothing, and
the phrases of each caption that name them.

  python segment.py --annotations CUHK-PEDES/reid_raw.json --image_root CUHK-PEDES/imgs --output_dir {DATASET_PATH}

--annotations is the file of CUHK-PEDES, ICFG-PEDES or RSTPReid, or another list of objects with split, captions,
file_path (or img_path) and id. Every caption becomes one sample: OUT/00000/000000017.{jpg,json,npy}, with
OUT/img_ids{,_train,_test}.txt, meta.jsonl (where each sample comes from), segments_report.json and segments.png (some
samples with their regions and phrases, to look at).
Run the same command again after an interruption to continue where it stopped. On several GPUs or machines run it once for each, with
--shard 1/4, 2/4, ... and the same --output_dir; the last one to finish writes the lists.
"""


@command
def main(argv: list[str]) -> int:
    """Make or complete a training folder; returns the exit status."""
    args = build_parser().parse_args(argv)
    _check_flags(args)
    if args.ray:
        from tbps_common.pipeline.ray import run_on_ray

        return run_on_ray("dp_gen.cli:segment_main", argv, args)
    from dp_gen.segmentation.run import run

    return run(args)


def _check_flags(args: argparse.Namespace) -> None:
    if args.backend == "none" and not args.mask_dir:
        raise InputError("--backend none needs --mask_dir, the folder of the masks")
    if args.backend != "none" and args.mask_dir:
        raise InputError("--mask_dir is read with --backend none only: add that, or leave out --mask_dir")
    if args.boxes and args.backend != "sam":
        raise InputError("--boxes is read with --backend sam only: add that, or leave out --boxes")
    if len(set(args.types)) != len(args.types):
        raise InputError(f"--types names a type twice: {' '.join(args.types)}")
    for flag, used in (
        ("parsing_model", args.backend != "none" and not args.boxes),
        ("sam_model", args.backend == "sam"),
    ):
        name = getattr(args, flag)
        if used and not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise InputError(
                f"--{flag} {name} is not a folder: name a folder in transformers' layout, or a model of the hub"
            )
    root = Path(args.output_dir)
    if root.exists() and not root.is_dir():
        raise InputError(f"--output_dir {root} is a file: name a folder")


def build_parser() -> argparse.ArgumentParser:
    """The flags of `segment.py`."""
    parser = argparse.ArgumentParser(
        prog="segment.py", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--annotations", required=True, help="annotation file of the data set")
    parser.add_argument("--image_root", required=True, help="folder that its file names start in")
    parser.add_argument("--output_dir", required=True, help="the training folder")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=("train", "val", "test"),
        default=["train", "test"],
        help="splits to take; val joins the training ids",
    )
    parser.add_argument(
        "--types",
        nargs="+",
        default=["hair", "uppercloth", "bottomcloth"],
        help="attribute types; the k-th has the value k in the masks (also known: hat shoes bag scarf sunglasses belt)",
    )
    regions = parser.add_argument_group("regions")
    regions.add_argument(
        "--backend",
        choices=("parsing", "sam", "none"),
        default="parsing",
        help="human parsing; SAM within the parser's boxes; or masks that exist already",
    )
    regions.add_argument(
        "--parsing_model", default="mattmdjaga/segformer_b2_clothes", help="folder or hub name of a parser"
    )
    regions.add_argument("--sam_model", default="facebook/sam-vit-base", help="folder or hub name of SAM or SAM-HQ")
    regions.add_argument("--boxes", help='JSON file of boxes for SAM, {"file": {"type": [x1, y1, x2, y2]}}')
    regions.add_argument("--mask_dir", help="folder of label PNGs (or .npy) named as the images")
    regions.add_argument("--class_map", help='JSON file of class numbers, {"type": [number, ...]}; default: ATR')
    regions.add_argument("--batch_size", type=whole_number(1), default=16, help="images at a time")
    regions.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_shard_flags(regions)
    phrases = parser.add_argument_group("phrases")
    phrases.add_argument("--lexicon", help='JSON file of further head nouns, {"type": ["word", ...]}')
    phrases.add_argument("--keep_empty", action="store_true", help="list samples without any segment too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
