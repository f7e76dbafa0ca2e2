"""`segment.py`, `dp-segment`: make a training folder from a data set's images and captions."""

import argparse
import hashlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dp_gen.run_settings import require_same_settings, store_settings
from tbps_common.errors import InputError
from tbps_common.pipeline.stages import Shard, shard
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
After an interruption the same command goes on where it stopped. On several GPUs or machines run it once for each, with
--shard 1/4, 2/4, ... and the same --output_dir; the last one to finish writes the lists.
"""

META_NAME, REPORT_NAME, SETTINGS_NAME = "meta.jsonl", "segments_report.json", "segment_settings.json"
OVERVIEW_NAME = "segments.png"
_FLAGS_OF_CONTENT = (
    "annotations backend parsing_model sam_model boxes mask_dir class_map types lexicon splits keep_empty".split()
)


@command
def main(argv: list[str]) -> int:
    """Make or complete a training folder; returns the exit status."""
    args = build_parser().parse_args(argv)
    _check_flags(args)
    from dp_gen.segmentation.phrases import load_lexicon
    from dp_gen.segmentation.samples import is_complete, read_samples
    from tbps_common.images import check_images_exist

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
            print("stopped; the same command goes on from here", file=sys.stderr)
            return interrupted
    left = sum(not is_complete(sample, root) for sample in samples)
    if left:
        print(f"{left} of {len(samples)} captions are left to the other shards")
        return 0
    return _finish(args, samples, root, settings)


def _shard_of(samples: list[Any], shard: Shard) -> list[Any]:
    """The samples of every n-th image: captions of one image are done together."""
    places: dict[str, int] = {}
    for sample in samples:
        places.setdefault(sample.path, len(places))
    return [sample for sample in samples if places[sample.path] % shard.count == shard.index - 1]


def _segment(args: argparse.Namespace, backend: Any, missing: list[Any], lexicon: Any, root: Path) -> int | None:
    """Make the missing samples; returns an exit status if a signal asked to stop."""
    from dp_gen.segmentation.masks import type_mask
    from dp_gen.segmentation.phrases import find_phrases
    from dp_gen.segmentation.samples import read_whole_image, segments_of, write_sample
    from tbps_common.run.progress import Progress
    from tbps_common.run.stop import Interruption

    by_image = [list(group) for _, group in itertools.groupby(missing, key=lambda sample: sample.path)]
    with Interruption() as interruption, Progress(len(missing), unit="caption") as progress:
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
                    progress.update()
    return None


def _finish(args: argparse.Namespace, samples: list[Any], root: Path, settings: dict[str, Any]) -> int:
    """Write id files, meta.jsonl, the report and the picture from the samples' own files."""
    from dp_gen.segmentation.overview import write_overview
    from dp_gen.segmentation.samples import read_segments
    from tbps_common.files import write_json, write_text

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


def _backend(args: argparse.Namespace) -> Any:
    from dp_gen.segmentation.backends import BoxPrompted, MaskFolder, Parser, read_boxes, read_class_map

    class_map = read_class_map(args.class_map) if args.class_map else None
    if args.backend == "none":
        return MaskFolder(Path(args.mask_dir), args.types, class_map)
    boxes = read_boxes(args.boxes) if args.boxes else None
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    print(f"segmenting on {device}")
    parser = None if boxes is not None else Parser(args.parsing_model, args.types, class_map, device)
    if args.backend == "parsing":
        return parser
    return BoxPrompted(args.sam_model, args.types, parser, boxes or {}, device)


def _check_flags(args: argparse.Namespace) -> None:
    if args.backend == "none" and not args.mask_dir:
        raise InputError("--backend none needs --mask_dir, the folder of the masks")
    if args.backend != "none" and args.mask_dir:
        raise InputError("--mask_dir is read with --backend none only: add that, or leave --mask_dir out")
    if args.boxes and args.backend != "sam":
        raise InputError("--boxes is read with --backend sam only: add that, or leave --boxes out")
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


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    # Ids are places in the annotation file: one that has been edited since would give finished samples to other captions.
    content = hashlib.sha256(Path(args.annotations).read_bytes()).hexdigest()
    return {**{name: getattr(args, name) for name in _FLAGS_OF_CONTENT}, "annotations (content)": content}


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
    regions.add_argument(
        "--shard",
        type=shard,
        default=Shard(),
        metavar="I/N",
        help="every N-th image from the I-th: for N GPUs or machines",
    )
    phrases = parser.add_argument_group("phrases")
    phrases.add_argument("--lexicon", help='JSON file of further head nouns, {"type": ["word", ...]}')
    phrases.add_argument("--keep_empty", action="store_true", help="list samples without any segment too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
