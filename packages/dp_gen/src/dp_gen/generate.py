"""`generate.py`, `dp-generate`: new persons from descriptions with references, and edits of existing images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_gen.options import build_parser as build_shared_parser
from tbps_common.errors import InputError
from tbps_common.pipeline.stages import Shard, shard
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

_FLAGS_OF_CONTENT = (
    "pretrained_model_hf revision variant image_encoder_hf finetuned_model_path load_model resolution "
    "MAX_REFERENCE_ATTRIBUTE_NUM mixed_precision inference_steps guidance_scale start_merge_step "
    "num_images_per_description test_description test_reference_attribute_folder descriptions negative_description "
    "height width edit_folder edit_split edit_labels reference_pool strength mask_dilation edit_mask edit_caption"
).split()


@command
def main(argv: list[str]) -> int:
    """Generate or edit; returns the exit status."""
    args = build_parser().parse_args(argv)
    args.seed = 0 if args.seed is None else args.seed
    _check_flags(args)
    return _edit(args) if args.edit_folder else _new(args)


def _new(args: argparse.Namespace) -> int:
    from dp_gen.generation.tasks import check_descriptions, new_tasks, one_description, read_descriptions

    if args.descriptions:
        descriptions = read_descriptions(args.descriptions)
    else:
        descriptions = one_description(args.test_description, args.test_reference_attribute_folder)
    check_descriptions(descriptions, _known_slots(args))
    tasks = new_tasks(descriptions, args.num_images_per_description, args.seed)
    from dp_gen.generation.produce import new_row

    def produce(producer: Any, batch: Sequence[Any]) -> list[tuple[Any, dict[str, Any]]]:
        return list(zip(producer.new(batch), map(new_row, batch)))

    def fit(producer: Any, tasks: list[Any]) -> list[Any]:
        producer.check(tasks)
        return tasks

    return _run(args, tasks, produce, fit)


def _edit(args: argparse.Namespace) -> int:
    from dp_gen.data_layout import FolderLayout, require_files
    from dp_gen.generation.references import read_pool
    from dp_gen.generation.tasks import EditPlan, edit_tasks

    pool = read_pool(args.reference_pool)
    labels = tuple(args.edit_labels or pool)
    unknown = [label for label in labels if label not in pool]
    if unknown:
        raise InputError(f"--edit_labels {' '.join(unknown)}: the pool has references for {', '.join(pool)} only")
    slots = _known_slots(args) or args.MAX_REFERENCE_ATTRIBUTE_NUM
    substitute = args.edit_caption == "substituted"
    plan = EditPlan(labels, pool, args.num_images_per_description, slots, args.seed, substitute, args.limit)
    layout = FolderLayout(args.edit_folder, args.edit_split)
    require_files(layout)
    tasks, without = edit_tasks(layout, plan)
    if without:
        print(f"{without} samples of {args.edit_folder} have no segment of {', '.join(labels)} and are left out")
    from dp_gen.data import TrainingFolder
    from dp_gen.generation.produce import edit_row, read_persons

    folder = TrainingFolder(args.edit_folder, args.edit_split)
    persons = read_persons(Path(args.edit_folder))

    def produce(producer: Any, batch: Sequence[Any]) -> list[tuple[Any, dict[str, Any]]]:
        images = producer.edits(batch, folder)
        return [(image, edit_row(task, persons.get(task.sample))) for image, task in zip(images, batch)]

    def fit(producer: Any, tasks: list[Any]) -> list[Any]:
        fitted = [task for task in map(producer.fitted, tasks) if task is not None]
        if len(fitted) < len(tasks):
            print(
                f"{len(tasks) - len(fitted)} edits are left out: their phrases lie beyond the longest text of the model"
            )
        return fitted

    return _run(args, tasks, produce, fit, originals=lambda row: folder.image_path(row["source"]))


def _run(args: argparse.Namespace, tasks: list[Any], produce: Any, fit: Any, *, originals: Any = None) -> int:
    from dp_gen.generation.run import Run

    if not tasks:
        raise InputError("there is nothing to generate: check the descriptions, --edit_folder and --edit_labels")
    settings = {**{name: getattr(args, name) for name in _FLAGS_OF_CONTENT}, "seed": args.seed}
    run = Run(Path(args.out), settings)
    producer = _producer(args)
    tasks = fit(producer, tasks)
    if not tasks:
        raise InputError("no edit is left: shorten the captions of --edit_folder")
    return run.make(
        tasks,
        lambda batch: produce(producer, batch),
        batch_size=args.generation_batch_size,
        shard=args.shard,
        originals=originals,
    )


def _producer(args: argparse.Namespace) -> Any:
    import torch

    from dp_gen.generation.produce import Producer, Sampling
    from dp_gen.model import DiversePersonPipeline
    from tbps_common.run.device import choose_device, device_sentence

    device = choose_device(args.device)
    precision = args.mixed_precision or "no"
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    print(device_sentence(args.device, device, {"no": "float32"}.get(precision, precision)))
    pipeline = DiversePersonPipeline.from_args(args, dtype=dtype)
    pipeline.model.to(device)
    sampling = Sampling(
        steps=args.inference_steps,
        guidance=args.guidance_scale,
        start_merge_step=args.start_merge_step,
        negative=args.negative_description,
        height=args.height,
        width=args.width,
        strength=args.strength,
        dilation=args.mask_dilation,
        whole_person=args.edit_mask == "full",
    )
    return Producer(pipeline, sampling)


def _known_slots(args: argparse.Namespace) -> int | None:
    """References that the model takes, where it says so without being loaded."""
    from tbps_common.datasets import read_json

    if not args.finetuned_model_path:
        return args.MAX_REFERENCE_ATTRIBUTE_NUM
    config = Path(args.finetuned_model_path) / "dp_gen_config.json"
    if not config.is_file():
        return args.MAX_REFERENCE_ATTRIBUTE_NUM
    settings = read_json(config)
    slots = settings.get("max_reference_attribute_num") if isinstance(settings, dict) else None
    return slots if isinstance(slots, int) else None


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
            raise InputError(f"--{side} must be a multiple of 8 from 64 on, not {value}")
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
    output.add_argument("--out", default="generated", help="folder of everything that is written")
    output.add_argument(
        "--descriptions", help='JSON lines {"description": "...<|image|>...", "references": [file, ...]}'
    )
    output.add_argument("--negative_description", default="", help="caption to steer away from")
    output.add_argument("--height", type=whole_number(64), help="of new persons; default: the model's resolution")
    output.add_argument("--width", type=whole_number(64), help="of new persons; default: the model's resolution")
    output.add_argument("--generation_batch_size", type=whole_number(1), default=8, help="images at a time")
    output.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    output.add_argument(
        "--shard",
        type=shard,
        default=Shard(),
        metavar="I/N",
        help="every N-th image from the I-th: for N GPUs or machines",
    )
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
        "--edit_mask", choices=("attributes", "full"), default="attributes", help="what may change: or the whole person"
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
