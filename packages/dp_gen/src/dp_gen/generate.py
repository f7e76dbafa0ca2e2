"""`generate.py`, `dp-generate`: new persons from descriptions with references, and edits of existing images."""

import argparse
import sys
from pathlib import Path

from dp_gen.options import build_parser as build_shared_parser
from tbps_common.errors import InputError
from tbps_common.pipeline.stages import add_shard_flags
from tbps_common.run.arguments import number, whole_number
from tbps_common.run.command import command

DESCRIPTION = """\
Make persons with a trained editor.

New persons, with one reference image per <|image|> in the description:

  python generate.py --finetuned_model_path {OUTPUT_PATH} --out new \\
    --test_description "a woman with gold hair<|image|> and a white skirt<|image|>" \\
    --test_reference_attribute_folder references/

Edits of the images of a training folder (segment.py makes one), with references drawn from a pool of product images:

  python generate.py --finetuned_model_path {OUTPUT_PATH} --out edits \\
    --edit_folder {DATASET_PATH} --reference_pool products/

Everything written goes to --out: images, edits.jsonl (which annotate.py --origin_path reads), contact_sheet.png. After an
interruption the same command makes the missing images only; an image depends on --seed and its own number alone. On
several GPUs or machines run it once for each, with --shard 1/4, 2/4, ... and the same --out.
The groups "generation" and "generate.py" below are this command's own; flags that concern the training alone (learning
rates, losses, ...) are accepted and have no effect.
"""


@command
def main(argv: list[str]) -> int:
    """Generate or edit; returns the exit status."""
    args = build_parser().parse_args(argv)
    args.seed = 0 if args.seed is None else args.seed
    _check_flags(args)
    if args.ray:
        from tbps_common.pipeline.ray import run_on_ray

        return run_on_ray("dp_gen.cli:generate_main", argv, args)
    from dp_gen.generation.run import run

    return run(args)


def _check_flags(args: argparse.Namespace) -> None:
    chosen = [flag for flag in ("test_description", "descriptions", "edit_folder") if getattr(args, flag)]
    if len(chosen) != 1:
        raise InputError(
            "give exactly one of --test_description and --descriptions (new persons) and --edit_folder (edits)"
            + (f", not {' and '.join(f'--{flag}' for flag in chosen)}" if chosen else "")
        )
    if args.edit_folder and not Path(args.edit_folder).is_dir():
        raise InputError(
            f"--edit_folder {args.edit_folder} is not a folder: name a training folder (segment.py makes one)"
        )
    if args.edit_folder and not args.reference_pool:
        raise InputError("--edit_folder needs --reference_pool, the folder of reference images")
    if args.finetuned_model_path and not Path(args.finetuned_model_path).exists():
        raise InputError(f"--finetuned_model_path {args.finetuned_model_path} does not exist: check the path")
    if not args.finetuned_model_path and not args.load_model:
        raise InputError("--finetuned_model_path is missing: name the --output_dir of a training, or a checkpoint")
    if args.guidance_scale <= 1:
        raise InputError(f"--guidance_scale must be above 1, not {args.guidance_scale:g}")
    if args.strength > 1:
        raise InputError(f"--strength must lie above 0 and be at most 1, not {args.strength:g}")
    for side in ("height", "width"):
        value = getattr(args, side)
        if value is not None and (value % 8 or value < 64):
            raise InputError(f"--{side} must be a multiple of 8 and at least 64, not {value}")
    root = Path(args.out)
    if root.exists() and not root.is_dir():
        raise InputError(f"--out {root} is a file: name a folder")


def build_parser() -> argparse.ArgumentParser:
    """The shared flags, and those of generation."""
    parser = build_shared_parser("generate.py", DESCRIPTION)
    # Not the list of all flags, most of which belong to the training.
    parser.usage = (
        "generate.py --finetuned_model_path DIR --out DIR --test_description TEXT [...]\n"
        "       generate.py --finetuned_model_path DIR --out DIR --descriptions FILE [...]\n"
        "       generate.py --finetuned_model_path DIR --out DIR --edit_folder DIR --reference_pool DIR [...]"
    )
    output = parser.add_argument_group("generate.py (additions)")
    output.add_argument("--out", default="generated", help="folder for everything that is written")
    output.add_argument(
        "--descriptions", help='JSON lines {"description": "...<|image|>...", "references": [file, ...]}'
    )
    output.add_argument("--negative_description", default="", help="caption to steer away from")
    output.add_argument(
        "--height", type=whole_number(64), help="height of new persons; default: the model's resolution"
    )
    output.add_argument("--width", type=whole_number(64), help="width of new persons; default: the model's resolution")
    output.add_argument("--generation_batch_size", type=whole_number(1), default=8, help="images at a time")
    output.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_shard_flags(output)
    edits = parser.add_argument_group("generate.py, edits (additions)")
    edits.add_argument("--edit_folder", help="training folder whose images are edited")
    edits.add_argument("--edit_split", choices=("train", "test", "all"), default="train", help="samples to edit")
    edits.add_argument("--edit_labels", nargs="+", help="attribute types to replace; default: those of the pool")
    edits.add_argument(
        "--reference_pool", help="reference images: subfolders uppercloth/red_coat.jpg, or a references.jsonl"
    )
    edits.add_argument("--limit", type=whole_number(1), help="edit the first N samples only")
    edits.add_argument(
        "--strength", type=number(0, above=True), default=0.8, help="share of the steps; 1 forgets the edited region"
    )
    edits.add_argument("--mask_dilation", type=number(0, 0.5), default=0.04, help="edited regions grow by this share")
    edits.add_argument(
        "--edit_mask",
        choices=("attributes", "full"),
        default="attributes",
        help="what may change: the edited attributes, or the whole person",
    )
    edits.add_argument(
        "--edit_caption",
        choices=("original", "substituted"),
        default="original",
        help="what the model reads: the original caption, or one with the references' phrases put in",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
