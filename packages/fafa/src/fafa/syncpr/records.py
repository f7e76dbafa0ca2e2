"""The records that the stages hand to each other, read strictly."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fafa.syncpr.prompts import QUADRUPLE_KEYS, caption_key
from tbps_common.errors import DatasetError
from tbps_common.files import write_text
from tbps_common.pipeline import Record, Shard, encode, read_stage

QUADRUPLES, REQUESTS, IMAGES, SCORES, VERDICTS, KEPT = "quadruples", "requests", "images", "scores", "vlm", "kept"


@dataclass(frozen=True, slots=True)
class Quadruple:
    """Two captions of one person, and the edits between them."""

    id: int
    caption_1: str
    caption_2: str
    edit_1_to_2: str
    edit_2_to_1: str


def are_new(seen: set[str], *captions: str) -> bool:
    """Whether none of the captions has been seen; then they are added. Otherwise their quadruple is a duplicate."""
    keys = set(map(caption_key, captions))
    if keys & seen:
        return False
    seen |= keys
    return True


def pair_key(record: Record) -> tuple[int, int]:
    """What makes a picture itself: its quadruple and variant."""
    return record["quadruple_id"], record["variant"]


def key_in(path: str | Path) -> Callable[[Record], Hashable]:
    """`pair_key` for the lines of a file that people may have edited.

    The function raises:
        DatasetError: a line is not a record of a picture.
    """

    def key(record: Record) -> Hashable:
        if not _is_picture(record):
            raise DatasetError(
                f"{path}, or its list of drops, has a line without whole numbers quadruple_id and variant; correct or "
                f"delete it: {str(record)[:200]}"
            )
        return pair_key(record)

    return key


def load_quadruples(folder: str | Path) -> tuple[dict[int, Quadruple], int]:
    """The quadruples of all shards by id, in the order of the ids; and how many repeat a caption of an earlier one.

    A shard cannot see the captions of the others, so the last duplicates are left out here, always the same ones.

    Raises:
        DatasetError: the stage is absent or unfinished, or a record cannot be used.
    """
    found: dict[int, Quadruple] = {}
    for record in read_stage(folder, QUADRUPLES):
        quadruple = _quadruple(record, folder)
        if quadruple.id in found:
            raise DatasetError(f"{folder}: two quadruples have the id {quadruple.id}; give every one its own")
        found[quadruple.id] = quadruple
    if not found:
        raise DatasetError(f"{folder} holds no quadruples: raise --count of fafa-syncpr quadruples")
    seen: set[str] = set()
    kept = {of: found[of] for of in sorted(found) if are_new(seen, found[of].caption_1, found[of].caption_2)}
    return kept, len(found) - len(kept)


def is_own(shard: Shard, quadruple: int) -> bool:
    """Whether a quadruple is of a shard: decided by its id, so that those which come later move no other one."""
    return quadruple % shard.count == shard.index - 1


def load_pairs(folder: str | Path, stage: str) -> list[Record]:
    """The records of `images` or `kept`, of all shards, sorted by quadruple and variant.

    Raises:
        DatasetError: the stage is absent or unfinished, or a record cannot be used.
    """
    records = read_stage(folder, stage)
    seen: set[Hashable] = set()
    for record in records:
        if not _is_picture(record):
            raise DatasetError(
                f"{folder}: a record of {stage}.jsonl has no whole numbers quadruple_id and variant: {record}"
            )
        if pair_key(record) in seen:
            raise DatasetError(
                f"{folder}: {stage}.jsonl lists quadruple {record['quadruple_id']}, variant {record['variant']} twice"
            )
        seen.add(pair_key(record))
        for side in ("left", "right"):
            _inside(record.get(side), folder, stage)
    return sorted(records, key=pair_key)


def write_records(output: Path, kept: list[Record], dropped: list[Record]) -> None:
    """Write what a stage chose, and beside it what it did not, each file whole or not at all."""
    write_text(output, b"".join(map(encode, kept)).decode())
    aside = Path(f"{output}.dropped.jsonl")
    if dropped:
        write_text(aside, b"".join(map(encode, dropped)).decode())
    else:
        aside.unlink(missing_ok=True)


def _quadruple(record: Record, folder: str | Path) -> Quadruple:
    number = record.get("id")
    texts = [record.get(name) for name in QUADRUPLE_KEYS]
    if type(number) is not int or number < 0:
        raise DatasetError(f"{folder}: a quadruple's id is {number!r}; it must be a whole number from 0 on")
    for name, text in zip(QUADRUPLE_KEYS, texts):
        if not isinstance(text, str) or not text.strip():
            raise DatasetError(f"{folder}: quadruple {number} has no text {name}")
    return Quadruple(number, *map(str, texts))


def _is_picture(record: Record) -> bool:
    return all(type(record.get(name)) is int and record[name] >= 0 for name in ("quadruple_id", "variant"))


def _inside(path: Any, folder: str | Path, stage: str) -> None:
    place = Path(path) if isinstance(path, str) else None
    if place is None or not path or place.is_absolute() or ".." in place.parts or "\0" in path:
        raise DatasetError(f"{folder}: {stage}.jsonl names the picture {path!r}, which is not a path inside the folder")
