"""The last step: all records of `regions.jsonl` and its shards as the JSON files that `--task sda` reads."""

import json
from collections import Counter
from pathlib import Path

from mra.dad.records import REGIONS, annotation_name, caption_range, digest, image_of, ranges, read_input
from tbps_common.errors import InputError
from tbps_common.files import write_json, write_text
from tbps_common.pipeline import Record

MANIFEST_NAME = "sda.manifest.json"
FIELDS = ("image", "boxes", "logits", "phrases", "caption", "image_id")


def pack(work: Path, sda: Path) -> None:
    """Write `sda_<a>_<b>.json` for every range of captions, and `sda.manifest.json` beside the stages' files.

    Pictures are numbered through (`image_id`) in the order of captions and variants. All files of the release's ranges
    are written, the empty ones too, so that the released configuration finds what it names.

    Args:
        work: folder of `regions.jsonl`.
        sda: folder of the JSON files.

    Raises:
        DatasetError: a shard is missing, unfinished or made with other settings, or nothing is left.
        InputError: `sda` holds files that are not from this folder, such as the released ones.
    """
    earlier = _own_files(work, sda)
    records, _ = read_input(work, REGIONS, "boxes", "logits", "phrases", "caption")
    by_range: dict[tuple[int, int], list[Record]] = {
        bounds: [] for bounds in ranges(max(record["index"] for record in records) + 1)
    }
    for number, record in enumerate(records):
        entry = {**record, "image_id": number}
        by_range[caption_range(record["index"])].append({name: entry[name] for name in FIELDS})
    texts = {annotation_name(bounds): _text(entries) for bounds, entries in by_range.items()}
    files = {name: list(dict.fromkeys([digest(text), *earlier.get(name, [])])) for name, text in texts.items()}
    summary = _summary(records)
    # Before the files, so that a run killed among them knows them as its own.
    write_json(work / MANIFEST_NAME, {"files": files, **summary})
    for name, text in texts.items():
        write_text(sda / name, text)
    print(
        f"{sda}: {len(records)} pictures in {sum(map(bool, by_range.values()))} files (of {len(by_range)}), "
        f"{summary['boxes']} boxes, {100 * summary['more_than_two_boxes']:.1f} % of the pictures have more than two"
    )


def _own_files(work: Path, sda: Path) -> dict[str, list[str]]:
    """Digests of the files that were packed before, by name; no other files may be in `sda`."""
    try:
        own = json.loads((work / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        own = {}
    for path in sorted(sda.glob("sda_*_*.json")):
        if digest(path.read_text(encoding="utf-8", errors="replace")) not in own.get(path.name, []):
            raise InputError(f"{path} was not made from {work} and would be replaced: give another --sda")
    return own


def _text(entries: list[Record]) -> str:
    lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def _summary(records: list[Record]) -> Record:
    counts = Counter(len(record["boxes"]) for record in records)
    removed: Counter[str] = Counter()
    for record in records:
        removed.update(record.get("removed", {}))
    return {
        "pictures": len(records),
        "captions": len({record["index"] for record in records}),
        "boxes": sum(count * pictures for count, pictures in counts.items()),
        "boxes_per_picture": {str(count): counts[count] for count in sorted(counts)},
        "more_than_two_boxes": sum(pictures for count, pictures in counts.items() if count > 2) / len(records),
        "removed_boxes": dict(sorted(removed.items())),
        "phrases": len({phrase for record in records for phrase in record["phrases"]}),
        "first_image": image_of(records[0]),
    }
