"""The records that the stages of DaD hand to each other: their names, how they are read, and how a stage is run on them."""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from tbps_common.datasets.sda import SHARDS
from tbps_common.errors import DatasetError, ImageError, InputError
from tbps_common.images import check_images_exist, read_image
from tbps_common.pipeline import Dropped, Record, in_batches, read_stage, run_stage

# Output of each stage, and the stage whose output it reads.
GENERATED, FILTERED, CAPTIONED, REGIONS = "generated", "filtered", "captioned", "regions"
MADE_BY = {GENERATED: "generate", FILTERED: "filter", CAPTIONED: "caption", REGIONS: "regions"}

EXTRA = "packages/mra[dad]"
MODEL_FILES = ("config.json", "model_index.json", "*.safetensors")
UNREADABLE = "cannot be read"
_LIBRARIES = ("diffusers", "peft", "torch", "transformers")

# The release's ranges; more captions than its 70,000 go on in the same steps.
_STEP = 5000
_RANGES = tuple((int(a), int(b)) for a, b in (name.removesuffix(".json").split("_")[1:] for name in SHARDS))


def caption_range(index: int) -> tuple[int, int]:
    """The range `(a, b)` that holds caption `index`, b excluded."""
    last = _RANGES[-1][1]
    if index >= last:
        start = last + (index - last) // _STEP * _STEP
        return start, start + _STEP
    return next(bounds for bounds in _RANGES if bounds[0] <= index < bounds[1])


def ranges(captions: int) -> list[tuple[int, int]]:
    """All ranges of the release, and those beyond them that so many captions need."""
    found = list(_RANGES)
    while found[-1][1] < captions:
        found.append(caption_range(found[-1][1]))
    return found


def image_name(index: int, variant: int) -> str:
    """Of a picture, below the image root: `c_0_5000/17_3.jpg`."""
    start, stop = caption_range(index)
    return f"c_{start}_{stop}/{index}_{variant}.jpg"


def annotation_name(bounds: tuple[int, int]) -> str:
    """Of the JSON file of a range: `sda_0_5000.json`."""
    return f"sda_{bounds[0]}_{bounds[1]}.json"


Process = Callable[[list[Record]], Iterable[Record | Dropped]]
PictureProcess = Callable[[list[Record], list[Image]], Sequence[Record | Dropped]]


def image_of(record: Record) -> str:
    """A record's key: the name of its picture below `--images`."""
    return record["image"]


def picture_order(record: Record) -> tuple[int, int]:
    """Sorts records by caption, then by variant, whatever shards they come from."""
    return record["index"], record["variant"]


def read_input(folder: Path, stem: str, *fields: str) -> tuple[list[Record], str]:
    """All records of a stage, in order of caption and variant, and a digest of how they were made.

    Args:
        folder: `--work`.
        stem: of the stage.
        fields: what its records must hold, beside image, index and variant.

    Raises:
        DatasetError: the stage is not finished, its shards were made with different settings, or a record is not its.
    """
    command = f"mra-dad {MADE_BY[stem]} --work {folder}"
    if not any(folder.glob(f"{stem}*.jsonl")):
        raise DatasetError(f"{folder} holds no {stem}.jsonl: run {command} first, or check --work")
    records = read_stage(folder, stem)
    if not records:
        raise DatasetError(f"{folder}: {command} kept no picture; the reasons are in {stem}*.jsonl.dropped.jsonl")
    try:
        records.sort(key=picture_order)
        keys = [image_of(record) for record in records]
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder}/{stem}*.jsonl holds records without image, index or variant ({error}): run {command} again"
        ) from error
    for record in records:
        if absent := [name for name in fields if name not in record]:
            raise DatasetError(
                f"{folder}/{stem}*.jsonl: the record of {image_of(record)} has no {absent[0]}: run {command} again"
            )
    for image in keys:
        if not isinstance(image, str) or os.path.isabs(image) or ".." in Path(image).parts or "\0" in image:
            raise DatasetError(
                f"{folder}/{stem}*.jsonl names the image {image!r}, which does not lie below --images: correct it"
            )
    # `read_stage` has seen that all shards have the same settings.
    settings = {json.dumps(manifest["settings"], sort_keys=True) for manifest in manifests(folder, stem)}
    return records, digest(*sorted(settings))


def manifests(folder: Path, stem: str) -> list[Record]:
    """Of a stage's output: one, or one per shard that has been begun.

    Raises:
        DatasetError: one of them is damaged.
    """
    found = []
    for path in sorted(folder.glob(f"{stem}*.jsonl.manifest.json")):
        if not path.with_name(path.name.removesuffix(".manifest.json")).exists():
            continue  # of a division of the work that was given up
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            manifest["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} is damaged: run mra-dad {MADE_BY[stem]} again") from error
        found.append(manifest)
    return found


def digest(*texts: str) -> str:
    """A short fingerprint of texts."""
    joined = hashlib.sha256()
    for text in texts:
        joined.update(text.encode("utf-8") + b"\0")
    return joined.hexdigest()[:16]


def run_on_pictures(
    args: argparse.Namespace,
    source: str,
    stem: str,
    build: Callable[[argparse.Namespace], PictureProcess],
    *,
    settings: Sequence[str],
    fields: Sequence[str] = (),
) -> int:
    """Run this shard of a stage that looks at the pictures of the stage before; returns the exit status.

    Args:
        args: flags of the subcommand.
        source: stem of the stage before.
        stem: of the output.
        build: loads the models and returns what turns a batch of records and their pictures into a result for each, in
            order. It never gets an empty batch, and no picture that cannot be read: that record is dropped.
        settings: names of the flags that the results depend on.
        fields: what the records of `source` must hold, beside image, index and variant.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or flags or models cannot be used.
    """
    records, made_with = read_input(Path(args.work), source, *fields)
    records = args.shard.of(records)  # the others need not stay in memory
    paths = [os.path.join(args.images, image_of(record)) for record in records]
    check_images_exist(paths, args.images, flag="--images")
    values = {**{name: getattr(args, name) for name in settings}, "input": made_with}
    return run(args, stem, records, values, lambda: _with_pictures(args.images, build(args)))


def _with_pictures(images: str, process: PictureProcess) -> Process:

    def run_batch(batch: list[Record]) -> Iterable[Record | Dropped]:
        pictures: list[Image | None] = []
        for record in batch:
            try:
                pictures.append(read_image(os.path.join(images, image_of(record))))
            except ImageError:
                pictures.append(None)
        records = [record for record, picture in zip(batch, pictures) if picture is not None]
        readable = [picture for picture in pictures if picture is not None]
        results = iter(process(records, readable) if records else ())
        return [Dropped(UNREADABLE) if picture is None else next(results) for picture in pictures]

    return run_batch


def run(
    args: argparse.Namespace,
    stem: str,
    items: list[Record],
    settings: Record,
    build: Callable[[], Process],
) -> int:
    """Run this shard of a stage.

    Args:
        args: flags of the subcommand.
        stem: of the output.
        items: records of this shard.
        settings: what the results depend on.
        build: loads the models and returns what turns a batch into results; not called if nothing is left to do.

    Returns:
        The exit status.

    Raises:
        InputError: input, flags or models cannot be used.
    """
    _refuse_other_sharding(args, stem)
    load = functools.cache(build)

    def process(batch: list[Record]) -> Iterator[Record | Dropped]:
        try:
            yield from load()(batch)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {len(batch)} does not fit into the GPU's memory: lower --batch_size (what is done so far is "
                "kept)"
            ) from error

    outcome = run_stage(
        items,
        in_batches(process, args.batch_size),
        args.shard.file(args.work, stem),
        key=image_of,
        settings=settings,
        notes={"batch_size": args.batch_size, "device": args.device, "libraries": versions()},
        unit="picture",
    )
    print(outcome.sentence("picture"))
    return outcome.exit_status


def _refuse_other_sharding(args: argparse.Namespace, stem: str) -> None:
    """A folder in which two divisions of the same work are mixed could not be read by the next stage."""
    own = args.shard.file(args.work, stem).name
    others = [
        path.name for path in Path(args.work).glob(f"{stem}*.jsonl") if not re.search(r"jsonl\.\w+\.jsonl$", path.name)
    ]
    total = f"-of-{args.shard.count}.jsonl" if args.shard.count > 1 else own
    foreign = sorted(name for name in others if name != own and not name.endswith(total))
    if foreign:
        raise InputError(
            f"{args.work} holds {foreign[0]}, which is of another number of shards than --shard {args.shard}: use the same number of shards"
        )


def versions() -> dict[str, str]:
    """Of the libraries that results depend on, where they are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
