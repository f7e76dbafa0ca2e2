"""A segmentation run: which captions are missing, images batch by batch, and the lists once all are done."""

import argparse
import hashlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dp_gen.run_settings import require_same_settings, store_settings
from dp_gen.segmentation.backends import Backend, BoxPrompted, MaskFolder, Parser, read_boxes, read_class_map
from dp_gen.segmentation.masks import type_mask
from dp_gen.segmentation.overview import write_overview
from dp_gen.segmentation.phrases import Lexicon, find_phrases, load_lexicon
from dp_gen.segmentation.samples import (
    Sample,
    is_complete,
    read_samples,
    read_segments,
    read_whole_image,
    segments_of,
    write_sample,
)
from tbps_common.errors import InputError
from tbps_common.files import write_json, write_text
from tbps_common.images import check_images_exist
from tbps_common.pipeline.stages import Shard
from tbps_common.run.device import choose_device
from tbps_common.run.progress import progress_bar
from tbps_common.run.stop import Interruption

META_NAME, REPORT_NAME, SETTINGS_NAME = "meta.jsonl", "segments_report.json", "segment_settings.json"
OVERVIEW_NAME = "segments.png"
_FLAGS_OF_CONTENT = (
    "annotations backend parsing_model sam_model boxes mask_dir class_map types lexicon splits keep_empty".split()
)


def run(args: argparse.Namespace) -> int:
    """Make or complete a training folder; returns the exit status."""
    lexicon = load_lexicon(args.lexicon)
    unnamed = [label for label in args.types if label not in lexicon]
    if unnamed:
        raise InputError(f"--types: no words are known for {', '.join(unnamed)}: give them with --lexicon")
    samples = read_samples(args.annotations, args.image_root, args.splits)
    check_images_exist((sample.path for sample in samples), args.image_root, flag="--image_root")
    root = Path(args.output_dir)
    settings = _settings(args)
    require_same_settings(root / SETTINGS_NAME, settings)
    own = _shard_of(samples, args.shard)
    missing = [sample for sample in own if not is_complete(sample, root)]
    print(f"{len(own)} captions, {len(own) - len(missing)} of them done before")
    if missing:
        backend = _backend(args)
        store_settings(root / SETTINGS_NAME, settings)
        interrupted = _segment(args, backend, missing, lexicon, root)
        if interrupted is not None:
            print("stopped; run the same command again to continue from here", file=sys.stderr)
            return interrupted
    left = sum(not is_complete(sample, root) for sample in samples)
    if left:
        print(f"{left} of {len(samples)} captions are left to the other shards")
        return 0
    return _finish(args, samples, root, settings)


def _shard_of(samples: list[Sample], shard: Shard) -> list[Sample]:
    """The samples of every n-th image: captions of one image are done together."""
    places: dict[str, int] = {}
    for sample in samples:
        places.setdefault(sample.path, len(places))
    return [sample for sample in samples if places[sample.path] % shard.count == shard.index - 1]


def _segment(
    args: argparse.Namespace, backend: Backend, missing: list[Sample], lexicon: Lexicon, root: Path
) -> int | None:
    """Make the missing samples; returns an exit status if a signal asked to stop."""
    by_image = [list(group) for _, group in itertools.groupby(missing, key=lambda sample: sample.path)]
    with Interruption() as interruption, progress_bar(len(missing), unit="caption") as bar:
        for start in range(0, len(by_image), args.batch_size):
            if interruption.requested:
                return interruption.exit_status
            groups = by_image[start : start + args.batch_size]
            images = [read_whole_image(group[0].path) for group in groups]
            found = backend.regions(images, [group[0].name for group in groups])
            for group, image, regions in zip(groups, images, found):
                mask = type_mask(regions, args.types, (image.height, image.width))
                for sample in group:
                    phrases = find_phrases(sample.caption, lexicon)
                    write_sample(sample, root, image, mask, segments_of(mask, args.types, sample.caption, phrases))
                    bar.update()
    return None


def _finish(args: argparse.Namespace, samples: list[Sample], root: Path, settings: dict[str, Any]) -> int:
    """Write id files, meta.jsonl, the report and the picture from the samples' own files."""
    ids: dict[str, list[str]] = {"train": [], "test": []}
    labels: Counter[str] = Counter()
    numbers: Counter[int] = Counter()
    meta, shown = [], []
    for sample in samples:
        segments = read_segments(sample, root)
        if segments:
            shown.append(sample)
        labels.update(segment["label"] for segment in segments)
        numbers[len(segments)] += 1
        meta.append(
            {
                "id": sample.id,
                "file_path": sample.name,
                "split": sample.split,
                "person": sample.person,
                "caption_index": sample.caption_index,
                "segments": len(segments),
            }
        )
        if segments or args.keep_empty:
            ids["test" if sample.split == "test" else "train"].append(sample.id)
    write_text(root / META_NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in meta))
    for split, names in ids.items():
        write_text(root / f"img_ids_{split}.txt", "".join(f"{name}\n" for name in names))
    write_text(root / "img_ids.txt", "".join(f"{name}\n" for names in ids.values() for name in names))
    report = {
        "captions": len(samples),
        "images": len({sample.path for sample in samples}),
        "ids": {split: len(names) for split, names in ids.items()},
        "segments": {label: labels[label] for label in args.types},
        "captions_by_number_of_segments": {str(number): numbers[number] for number in sorted(numbers)},
        "settings": settings,
    }
    write_json(root / REPORT_NAME, report)
    if shown:
        write_overview(root / OVERVIEW_NAME, shown, root, args.types)
    counts = ", ".join(f"{labels[label]} {label}" for label in args.types)
    print(f"{root}: {len(ids['train'])} training and {len(ids['test'])} test samples; segments: {counts}")
    if numbers[0] and not args.keep_empty:
        print(
            f"{numbers[0]} captions name nothing that their image shows; they are in no id file (--keep_empty adds them)"
        )
    return 0


def _backend(args: argparse.Namespace) -> Backend:
    class_map = read_class_map(args.class_map) if args.class_map else None
    if args.backend == "none":
        return MaskFolder(Path(args.mask_dir), args.types, class_map)
    device = choose_device(args.device)
    print(f"segmenting on {device}")
    boxes = read_boxes(args.boxes) if args.boxes else None
    parser = None if boxes is not None else Parser(args.parsing_model, args.types, class_map, device)
    if args.backend == "sam":
        return BoxPrompted(args.sam_model, args.types, parser, boxes or {}, device)
    assert parser is not None  # --boxes goes with SAM only
    return parser


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    # Ids are places in the annotation file: one that has been edited since would give finished samples to other captions.
    content = hashlib.sha256(Path(args.annotations).read_bytes()).hexdigest()
    return {**{name: getattr(args, name) for name in _FLAGS_OF_CONTENT}, "annotations (content)": content}
