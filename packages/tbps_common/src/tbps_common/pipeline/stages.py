"""Stages of a data pipeline: plain files in, plain files out, killed and run again without loss or repetition.

A stage turns records (JSON objects) into records. Its output `<stem>.jsonl` grows line by line; what was left out is in
`<stem>.jsonl.dropped.jsonl` with the reason; `<stem>.jsonl.manifest.json` holds the settings, the counts and whether the
stage is finished. With `--shard i/n` the names begin with `<stem>.i-of-n`, so that n machines share a folder.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import write_json
from tbps_common.pipeline.journal import Journal, Record, read_json_lines
from tbps_common.run.progress import Progress

_SHARD_NAME = re.compile(r"\.(\d+)-of-(\d+)\.jsonl$")


@dataclass(frozen=True)
class Shard:
    """Every n-th item, beginning with the i-th: what one of n machines works on.

    Attributes:
        index: 1 to count.
        count: of the shards.
    """

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[Any]) -> list[Any]:
        """This shard's items, in order."""
        return list(items[self.index - 1 :: self.count])

    def file(self, folder: str | Path, stem: str) -> Path:
        """The stage's output file: `<stem>.jsonl`, or `<stem>.2-of-8.jsonl`."""
        middle = "" if self.count == 1 else f".{self.index}-of-{self.count}"
        return Path(folder) / f"{stem}{middle}.jsonl"


def shard(text: str) -> Shard:
    """Type of an argparse flag `--shard i/n`."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 1 <= i <= n, such as 2/8")
    return Shard(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Dropped:
    """What a stage says of an item that it leaves out.

    Attributes:
        reason: counted in the manifest, so the same few words for the same cause.
        details: measured values, say, kept beside the reason.
    """

    reason: str
    details: Record = field(default_factory=dict)


@dataclass
class StageOutcome:
    """How a run of a stage ended.

    Attributes:
        output: the file.
        items: of this shard.
        kept: records in the file.
        dropped: reason -> count.
        before: items that were settled when the run began.
        seconds: of this run.
        interrupted: exit status of the signal that ended it, if one did.
    """

    output: Path
    items: int
    kept: int
    dropped: dict[str, int]
    before: int
    seconds: float
    interrupted: int | None = None

    @property
    def exit_status(self) -> int:
        """0 if every item is settled, 130 or 143 after a signal."""
        return self.interrupted or 0

    @property
    def per_second(self) -> float:
        """Items that this run settled, per second."""
        return (self.kept + sum(self.dropped.values()) - self.before) / max(self.seconds, 1e-9)

    def sentence(self, unit: str = "item") -> str:
        """What happened, in one line."""
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.dropped.items()))
        drops = f", {sum(self.dropped.values())} dropped ({reasons})" if reasons else ""
        left = self.items - self.kept - sum(self.dropped.values())
        rest = f", {left} to do: run the same command again" if left > 0 else ""
        return f"{self.output}: {self.kept} {unit}s kept{drops}{rest} ({self.per_second:.2f} {unit}s per second)"


def run_stage(
    items: Sequence[Record],
    process: Callable[[list[Record]], Sequence[Record | Dropped]],
    output: str | Path,
    *,
    key: Callable[[Record], Hashable],
    settings: Record,
    batch_size: int = 1,
    unit: str = "item",
    notes: Record | None = None,
    say: Callable[[str], None] = print,
) -> StageOutcome:
    """Process every item that `output` and its dropped file do not hold yet.

    A batch's results are on the disk before the next batch begins. Files that `process` writes itself (images) must be
    whole before it returns, and have names that depend on the item alone: a batch cut by a kill is done again. Ctrl-C or
    SIGTERM ends the run after the batch.

    Args:
        items: this shard's, in order.
        process: a batch of items -> for each, in order, its record (which `key` reads too) or why it is dropped.
        output: JSON-lines file; at the end it is in the items' order.
        key: what makes an item itself; of items, records and dropped entries alike.
        settings: what the results depend on (flags, model ids, seed). A folder made with others is refused.
        batch_size: items per call of `process`.
        unit: what an item is called in the progress bar.
        notes: more for the manifest, which results do not depend on.
        say: shows a sentence.

    Raises:
        InputError: another process writes `output`, it was made with other settings, or two items have one key.
        OSError: a record cannot be written; those before it are safe.
    """
    from tbps_common.run.stop import Interruption

    output = Path(output)
    keys = [key(item) for item in items]
    place = {of: number for number, of in enumerate(keys)}
    if len(place) != len(keys):
        twice = next(of for of, count in Counter(keys).items() if count > 1)
        raise InputError(f"{output}: two items have the key {twice}; every item needs its own")
    with Journal(output) as journal, Journal(f"{output}.dropped.jsonl") as drops:
        try:
            begin_manifest(output, settings, notes)  # by now no other process writes this output
        except InputError:
            _remove_if_empty(drops.path)
            raise
        for side in (journal, drops):
            if side.torn:
                say(f"{side.path}: the last line was cut short when an earlier run was killed; it is done again")
            if side.unreadable:
                raise InputError(f"{side.path}: {len(side.unreadable)} lines cannot be read; mend or delete the file")
        settled = {key(entry) for entry in [*journal.records, *drops.records]}
        waiting = [item for item, of in zip(items, keys) if of not in settled]
        before = len(items) - len(waiting)
        if before:
            say(f"{output}: {before} of {len(items)} {unit}s are there already")
        started = time.perf_counter()
        interrupted = None
        with Interruption() as interruption, Progress(len(items), initial=before, unit=unit, say=say) as progress:
            for begin in range(0, len(waiting), batch_size):
                if interruption.requested:
                    interrupted = interruption.exit_status
                    break
                batch = waiting[begin : begin + batch_size]
                for item, result in zip(batch, process(batch), strict=True):
                    if isinstance(result, Dropped):
                        drops.append({**item, **result.details, "reason": result.reason})
                    else:
                        journal.append(result)
                progress.update(len(batch), dropped=len(drops.records))
        # Records of items that are no longer asked for (an input that shrank) stay, at the end.
        for side in (journal, drops):
            side.rewrite(sorted(side.records, key=lambda entry: place.get(key(entry), len(place))))
        reasons = Counter(str(entry["reason"]) for entry in drops.records)
        outcome = StageOutcome(
            output,
            len(items),
            len(journal.records),
            dict(reasons),
            before,
            time.perf_counter() - started,
            interrupted,
        )
        _remove_if_empty(drops.path)
    finish_manifest(
        output,
        finished=interrupted is None,
        items=outcome.items,
        kept=outcome.kept,
        dropped=outcome.dropped,
        seconds=outcome.seconds,
    )
    return outcome


def manifest_path(output: str | Path) -> Path:
    """Where the manifest of an output file lies."""
    return Path(f"{output}.manifest.json")


def begin_manifest(output: str | Path, settings: Record, notes: Record | None = None) -> None:
    """Write the settings beside `output`, unfinished; or compare them with those it was begun with.

    Raises:
        InputError: they differ, or the manifest cannot be read.
    """
    path = manifest_path(output)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    earlier: Record = {}
    begun = any(_holds_something(file) for file in (Path(output), Path(f"{output}.dropped.jsonl")))
    # A run that failed before its first record binds nobody to its settings.
    if path.exists() and begun:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            made_with = dict(earlier["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; delete it to go on with the present settings") from error
        if made_with != settings:
            names = _differences(made_with, settings)
            name = names[0]
            raise InputError(
                f"{output} was begun with {name}={made_with.get(name)!r}, and this run has {name}={settings.get(name)!r}"
                f"{' (and others differ)' if len(names) > 1 else ''}: use the same settings, or another folder"
            )
    elif begun:
        raise InputError(f"{output} has no {path.name}: it is not from this command; move it away")
    write_json(path, {**earlier, "settings": settings, **(notes or {}), "finished": False})


def _remove_if_empty(path: Path) -> None:
    if not _holds_something(path):
        path.unlink()


def _differences(one: Record, other: Record) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name, ...) != other.get(name, ...))


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def finish_manifest(
    output: str | Path, *, finished: bool, items: int, kept: int, dropped: dict[str, int], seconds: float
) -> None:
    """Add the counts to the manifest that `begin_manifest` wrote; seconds of several runs add up."""
    path = manifest_path(output)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {
        "finished": finished,
        "items": items,
        "kept": kept,
        "dropped": dropped,
        "seconds": round(manifest.get("seconds", 0.0) + seconds, 3),
    }
    write_json(path, manifest)


def read_stage(folder: str | Path, stem: str) -> list[Record]:
    """All records of a stage: of `<stem>.jsonl`, or of all its shards, interleaved (sort them if the order matters).

    Raises:
        DatasetError: there is no such file, a shard is missing or unfinished, shards were made with different settings,
            or a line cannot be read.
    """
    folder = Path(folder)
    whole = folder / f"{stem}.jsonl"
    shards = sorted(
        (int(found[1]), int(found[2]), path)
        for path in folder.glob(f"{stem}.*-of-*.jsonl")
        if (found := _SHARD_NAME.fullmatch(path.name[len(stem) :]))
    )
    if whole.is_file():
        if shards:
            raise DatasetError(f"{folder} holds {whole.name} and shards of it ({shards[0][2].name}): keep one of them")
        return _records(whole)
    if not shards:
        raise DatasetError(f"{whole} does not exist; run the stage that writes it first")
    counts = {count for _, count, _ in shards}
    if len(counts) > 1:
        raise DatasetError(
            f"{folder}: the shards of {stem} are of {' and '.join(map(str, sorted(counts)))}: keep one set"
        )
    missing = sorted(set(range(1, counts.pop() + 1)) - {index for index, _, _ in shards})
    if missing:
        total = shards[0][1]
        raise DatasetError(
            f"{folder}: of {stem}, shard {missing[0]}/{total} is missing ({len(missing)} in all); run it"
        )
    parts = [_records(path) for _, _, path in shards]
    _require_same_settings([path for _, _, path in shards])
    longest = max(map(len, parts))
    return [part[row] for row in range(longest) for part in parts if row < len(part)]


def _require_same_settings(shards: list[Path]) -> None:
    made: list[tuple[Path, Record]] = []
    for path in shards:
        if manifest_path(path).is_file():
            made.append((path, json.loads(manifest_path(path).read_text(encoding="utf-8")).get("settings", {})))
    for path, settings in made[1:]:
        first, expected = made[0]
        if settings != expected:
            name = _differences(expected, settings)[0]
            raise DatasetError(
                f"{first} was made with {name}={expected.get(name)!r} and {path.name} with {name}={settings.get(name)!r}: "
                "make all shards with the same settings"
            )


def _records(path: Path) -> list[Record]:
    manifest = manifest_path(path)
    try:
        finished = json.loads(manifest.read_text(encoding="utf-8"))["finished"] if manifest.is_file() else True
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{manifest} is damaged; run the stage that writes {path.name} again") from error
    if not finished:
        raise DatasetError(f"{path} is not finished; run the stage that writes it again, it goes on where it stopped")
    records = []
    for number, line in read_json_lines(path):
        if isinstance(line, str):
            raise DatasetError(f"{path}, line {number + 1}: {line}")
        records.append(line)
    return records
