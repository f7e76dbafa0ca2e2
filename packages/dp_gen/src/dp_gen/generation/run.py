"""A generation run: what is to be made, images batch by batch, each listed once it is on the disk, and a sheet of some."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dp_gen.data.folder import TrainingFolder
from dp_gen.data.layout import FolderLayout, require_files
from dp_gen.generation.produce import Producer, Sampling, edit_row, new_row, read_persons
from dp_gen.generation.references import read_pool
from dp_gen.generation.tasks import (
    EditPlan,
    check_descriptions,
    edit_tasks,
    new_tasks,
    one_description,
    read_descriptions,
)
from dp_gen.model.pipeline import DiversePersonPipeline
from dp_gen.run_settings import require_same_settings, store_settings
from tbps_common.datasets import read_json
from tbps_common.errors import InputError
from tbps_common.files import atomic_path, write_text
from tbps_common.pipeline import Journal, Record, encode, in_batches, read_json_lines, run_stage
from tbps_common.report import Picture, PictureRow, picture_grid, spread
from tbps_common.run.device import choose_device, device_sentence

STEM = "edits"
MANIFEST, SETTINGS_NAME, SHEET = f"{STEM}.jsonl", "generate_settings.json", "contact_sheet.png"
_MANIFEST_NAMES = rf"{STEM}\.(\d+-of-\d+\.)?jsonl"  # with --shard, each machine has its own
_SHEET_LINES = 12

_FLAGS_OF_CONTENT = (
    "pretrained_model_hf revision variant image_encoder_hf finetuned_model_path load_model resolution "
    "MAX_REFERENCE_ATTRIBUTE_NUM mixed_precision inference_steps guidance_scale start_merge_step "
    "num_images_per_description test_description test_reference_attribute_folder descriptions negative_description "
    "height width edit_folder edit_split edit_labels reference_pool strength mask_dilation edit_mask edit_caption"
).split()


def run(args: argparse.Namespace) -> int:
    """Make the images that are missing; returns the exit status."""
    return _edit(args) if args.edit_folder else _new(args)


def _new(args: argparse.Namespace) -> int:
    if args.descriptions:
        descriptions = read_descriptions(args.descriptions)
    else:
        descriptions = one_description(args.test_description, args.test_reference_attribute_folder)
    check_descriptions(descriptions, _known_slots(args))
    tasks = new_tasks(descriptions, args.num_images_per_description, args.seed)
    producer = _begin(args, tasks)
    producer.check(tasks)
    return _make(args, tasks, lambda batch: zip(producer.new(batch), map(new_row, batch)))


def _edit(args: argparse.Namespace) -> int:
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
    folder = TrainingFolder(args.edit_folder, args.edit_split)
    persons = read_persons(Path(args.edit_folder))
    producer = _begin(args, tasks)
    fitted = [task for task in map(producer.fitted, tasks) if task is not None]
    if len(fitted) < len(tasks):
        print(f"{len(tasks) - len(fitted)} edits are left out: their phrases lie beyond the longest text of the model")
    if not fitted:
        raise InputError("no edit is left: shorten the captions of --edit_folder")

    def edited(batch: Sequence[Any]) -> Iterator[tuple[Image.Image, Record]]:
        rows = [edit_row(task, persons.get(task.sample)) for task in batch]
        return zip(producer.edits(batch, folder), rows)

    return _make(args, fitted, edited, original=lambda row: folder.image_path(row["source"]))


def _begin(args: argparse.Namespace, tasks: Sequence[Any]) -> Producer:
    """Check that there is work and that `--out` was begun with the same settings, then load the model."""
    if not tasks:
        raise InputError("there is nothing to generate: check the descriptions, --edit_folder and --edit_labels")
    require_same_settings(Path(args.out) / SETTINGS_NAME, _settings(args))
    return _producer(args)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {**{name: getattr(args, name) for name in _FLAGS_OF_CONTENT}, "seed": args.seed}


def _make(
    args: argparse.Namespace,
    tasks: Sequence[Any],
    produce: Callable[[Sequence[Any]], Iterator[tuple[Image.Image, Record]]],
    *,
    original: Callable[[Record], Path] | None = None,
) -> int:
    """Make this shard's images, each listed in the manifest once it is on the disk.

    Args:
        args: flags.
        tasks: everything to make, of all shards; the name of each is its file.
        produce: a batch of tasks -> images with their rows: `file`, `references`, `reference_attribute_list`, `caption`, ...
        original: row -> the image that was edited.
    """
    root = Path(args.out)
    store_settings(root / SETTINGS_NAME, _settings(args))
    manifest = args.shard.file(root, STEM)
    with Journal(manifest) as journal:  # an image that was deleted is made again
        journal.rewrite([row for row in journal.records if (root / str(row.get("file"))).is_file()])
    own = args.shard.of(tasks)
    made = _rows(root)
    print(f"{len(own)} images, {sum(task.name in made for task in own)} of them made before")
    by_name = {task.name: task for task in own if task.name not in made}

    def process(batch: list[Record]) -> Iterator[Record]:
        for image, row in produce([by_name[item["file"]] for item in batch]):
            save_image(image, root / row["file"])
            yield row

    outcome = run_stage(
        [{"file": name} for name in by_name],
        in_batches(process, args.generation_batch_size),
        manifest,
        key=lambda row: row.get("file"),
        unit="image",
    )
    if outcome.interrupted is not None:
        print("stopped; run the same command again to make the missing images", file=sys.stderr)
        return outcome.exit_status
    _conclude(root, [task.name for task in tasks], original)
    return 0


def _rows(root: Path) -> dict[str, Record]:
    """Rows of the manifests of all shards by file, as far as their images are there."""
    manifests = [path for path in root.glob(f"{STEM}.*jsonl") if re.fullmatch(_MANIFEST_NAMES, path.name)]
    rows = [row for path in sorted(manifests) for _, row in read_json_lines(path) if isinstance(row, dict)]
    return {str(row["file"]): row for row in rows if (root / str(row.get("file"))).is_file()}


def _conclude(root: Path, names: list[str], original: Callable[[Record], Path] | None) -> None:
    """List the images in order, and draw some of them; the last of several shards does it for all."""
    rows = _rows(root)
    left = sum(name not in rows for name in names)
    if left:
        print(f"{left} of {len(names)} images are left to the other shards")
        return
    order = {name: place for place, name in enumerate(names)}
    listed = sorted(rows.values(), key=lambda row: (order.get(row["file"], len(order)), row["file"]))
    write_text(root / MANIFEST, b"".join(map(encode, listed)).decode())
    drawn = []
    for place in spread(range(len(names)), _SHEET_LINES):
        row = rows[names[place]]
        pictures = [Picture(original(row), "original")] if original else []
        references = zip(row["reference_attribute_list"], map(Path, row["references"]))
        pictures += [Picture(file, phrase) for phrase, file in references if file.is_file()]
        drawn.append(PictureRow([*pictures, Picture(root / row["file"], row["file"])], row["caption"]))
    picture_grid(root / SHEET, drawn)
    print(f"{len(names)} images listed in {root / MANIFEST}; some of them in {root / SHEET}")


def save_image(image: Image.Image, path: Path) -> None:
    """JPEG of high quality or PNG, as the name ends; whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path, one_writer=True) as temporary:
        if path.suffix == ".jpg":
            image.save(temporary, format="JPEG", quality=95, subsampling=0)  # full colour resolution
        else:
            image.save(temporary, format="PNG")


def _producer(args: argparse.Namespace) -> Producer:
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
    if not args.finetuned_model_path:
        return args.MAX_REFERENCE_ATTRIBUTE_NUM
    config = Path(args.finetuned_model_path) / "dp_gen_config.json"
    if not config.is_file():
        return args.MAX_REFERENCE_ATTRIBUTE_NUM
    settings = read_json(config)
    slots = settings.get("max_reference_attribute_num") if isinstance(settings, dict) else None
    return slots if isinstance(slots, int) else None
