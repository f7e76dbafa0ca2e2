"""Stages of a data pipeline: plain files in, plain files out, killed and run again without loss or repetition.

A stage turns records (JSON objects) into records. Its output `<stem>.jsonl` grows line by line; what was left out is in
`<stem>.jsonl.dropped.jsonl` with the reason; `<stem>.jsonl.manifest.json` holds the settings, the counts and whether the
stage is finished. With `--shard i/n` the names begin with `<stem>.i-of-n`, so that n machines share a folder.

`run_stage` keeps the files; the work is done by `in_batches` (a function of a list of items) or by
`tbps_common.pipeline.chat.in_conversations` (a chat model, many requests at a time).
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from tbps_common.errors import DatasetError, InputError
from tbps_common.files import write_json
from tbps_common.pipeline.client import ServerRefusal
from tbps_common.pipeline.journal import Journal, Record, read_json_lines
from tbps_common.run.arguments import number, whole_number
from tbps_common.run.progress import progress_bar

KINDS = ("dropped", "rejected", "failed")

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


def add_shard_flags(parser: Any) -> None:
    """`--shard`, and `--ray` with what belongs to it (`tbps_common.pipeline.ray`)."""
    parser.add_argument(
        "--shard",
        type=shard,
        default=Shard(),
        metavar="I/N",
        help="process every N-th item from the I-th, for N GPUs or machines",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", default="", help="run all shards on a Ray cluster: its address, auto, or local"
    )
    parser.add_argument(
        "--ray-shards", "--ray_shards", type=whole_number(1), metavar="N", help="shards; None: one for each GPU, or CPU"
    )
    parser.add_argument(
        "--ray-gpus", "--ray_gpus", type=number(0), metavar="G", help="GPUs of a shard; None: 1, or 0 without any"
    )


@dataclass(frozen=True)
class Dropped:
    """What a stage says of an item that has no record.

    Attributes:
        reason: counted in the manifest, so the same few words for the same cause.
        details: measured values, say, kept beside the reason.
        kind: names the side file. `dropped` is for good; what is `rejected` (an answer of no use) or `failed` (no answer) is
            tried again by the next run.
    """

    reason: str
    details: Record = field(default_factory=dict)
    kind: Literal["dropped", "rejected", "failed"] = "dropped"


Results = Generator[tuple[Record, Record | Dropped], None, None]
Work = Callable[[Sequence[Record], Callable[[], bool]], Results]
"""Items in, each with its result out, in any order. The second argument tells whether the work is to end soon."""


def in_batches(process: Callable[[list[Record]], Iterable[Record | Dropped]], size: int = 1) -> Work:
    """The work of `run_stage` that a function does.

    Files that `process` writes itself (images) must be whole before it hands out their record, and have names that depend
    on the item alone: a batch cut by a kill is done again. A stop ends the work after a batch.

    Args:
        process: a batch of items -> for each, in order, its record or why it is dropped.
        size: items of a batch.
    """

    def work(items: Sequence[Record], stop: Callable[[], bool]) -> Results:
        for begin in range(0, len(items), size):
            if stop():
                return
            batch = list(items[begin : begin + size])
            yield from zip(batch, process(batch), strict=True)

    return work


@dataclass
class Outcome:
    """How a run of a stage ended.

    Attributes:
        output: the file.
        items: of this run.
        before: of them settled when it began.
        kept: records in the file.
        dropped: reason -> count, in the file of drops.
        done: items that got their record now.
        rejected: items whose answers were of no use; they are in `<output>.rejected.jsonl`.
        failed: items without an answer; they are in `<output>.failed.jsonl`.
        missing: items that are not settled.
        seconds: of this run.
        interrupted: exit status of the signal that ended it, if one did.
        refusal: why it was given up, if it was.
    """

    output: Path
    items: int
    before: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    done: int = 0
    rejected: int = 0
    failed: int = 0
    missing: int = 0
    seconds: float = 0.0
    interrupted: int | None = None
    refusal: str | None = None

    @property
    def exit_status(self) -> int:
        """0 if every item is settled; 130 or 143 after a signal; 2 if the server refuses; otherwise 1."""
        if self.interrupted is not None:
            return self.interrupted
        return 2 if self.refusal is not None else int(self.missing > 0)

    def sentence(self, unit: str = "item") -> str:
        """What happened, in one line."""
        parts = [f"{self.kept} {unit}s kept"]
        if self.dropped:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.dropped.items()))
            parts.append(f"{sum(self.dropped.values())} dropped ({reasons})")
        if self.rejected:
            parts.append(f"{self.rejected} without a usable answer")
        if self.failed:
            parts.append(f"{self.failed} without an answer")
        if self.missing:
            parts.append(f"{self.missing} to do: run the same command again")
        rate = (self.items - self.missing - self.before) / max(self.seconds, 1e-9)
        return f"{self.output}: {', '.join(parts)} ({rate:.2f} {unit}s per second)"


def run_stage(
    items: Sequence[Record],
    work: Work,
    output: str | Path,
    *,
    key: Callable[[Record], Hashable],
    settings: Record | None = None,
    notes: Record | None = None,
    order: Callable[[Record], Any] | None = None,
    unit: str = "item",
) -> Outcome:
    """Work on every item that `output` and its file of drops do not hold yet.

    Each result is on the disk before the next one is taken. Ctrl-C or SIGTERM ends the run soon and cleanly. At the end the
    files are put in order: lines that cannot be read first, as they are, then the records in the order of the items, then
    those of items that are no longer asked for. The side files keep the newest entry of every item without a record. A run
    that is refused before its first result leaves nothing behind.

    Args:
        items: this shard's, in order.
        work: `in_batches(...)` or `in_conversations(...)`; it is not begun when nothing is left to do.
        output: JSON-lines file.
        key: what identifies an item; it reads items, records and side files' entries alike. None: of no item.
        settings: what the results depend on (flags, model ids, seed). A folder made with others is refused. Without them
            there is no manifest.
        notes: more for the manifest, which results do not depend on.
        order: sorts the records in another way.
        unit: what an item is called in the progress bar.

    Raises:
        InputError: another process writes `output`, it was made with other settings, or two items have one key.
        OSError: a record cannot be written; those before it are safe.
    """
    from tbps_common.run.stop import Interruption  # which imports torch, and --help must not

    with _Files(Path(output), key) as files:
        keys = [key(item) for item in items]
        waiting = [item for item, of in zip(items, keys) if of not in files.settled]
        _require_distinct([of for of in keys if of not in files.settled], files.output.path)
        if settings is not None:
            begin_manifest(output, settings, notes)  # by now no other process writes this output
        outcome = Outcome(files.output.path, len(items), before=len(items) - len(waiting))
        if outcome.before:
            say(f"{output}: {outcome.before} of {len(items)} {unit}s are there already")
        started = time.perf_counter()
        with (
            Interruption() as interruption,
            progress_bar(len(items), initial=outcome.before, unit=unit) as bar,
            closing(work(waiting, lambda: interruption.requested)) as results,
        ):
            try:
                for item, result in results:
                    files.add(item, result)
                    kind = result.kind if isinstance(result, Dropped) else "done"
                    outcome.done += kind == "done"
                    outcome.rejected += kind == "rejected"
                    outcome.failed += kind == "failed"
                    bar.set_postfix(
                        {name: len(side.records) for name, side in files.sides.items() if side.records}, refresh=False
                    )
                    bar.update(int(kind in ("done", "dropped")))
            except ServerRefusal as refusal:
                outcome.refusal = str(refusal)
        outcome.seconds = time.perf_counter() - started
        outcome.missing = sum(of not in files.settled for of in keys)
        if interruption.requested and outcome.missing:
            outcome.interrupted = interruption.exit_status
        place = {of: number for number, of in enumerate(keys)}
        files.put_in_order(order or (lambda entry: -1 if key(entry) is None else place.get(key(entry), len(place))))
        outcome.kept = len(files.output.records)
        outcome.dropped = dict(Counter(str(entry["reason"]) for entry in files.sides["dropped"].records))
    if settings is not None:
        finish_manifest(
            output,
            finished=not outcome.missing,
            items=outcome.items,
            kept=outcome.kept,
            dropped=outcome.dropped,
            seconds=outcome.seconds,
        )
    return outcome


def say(sentence: str) -> None:
    """Print a sentence above a progress bar that may be shown."""
    tqdm.write(sentence, file=sys.stdout)


class _Files:
    """The output of a stage and its side files; while they are open, no other process can open the output.

    Attributes:
        output: the records.
        sides: what has no record, by the kind of `Dropped`; an empty one is deleted at the end.
        settled: keys of the items that have their record, or are dropped for good.
    """

    def __init__(self, output: Path, key: Callable[[Record], Hashable]) -> None:
        self._key, self._folder_is_new = key, not output.parent.exists()
        self.output, self.sides = Journal(output), dict[str, Journal]()
        try:
            for kind in KINDS:
                self.sides[kind] = Journal(f"{output}.{kind}.jsonl")
            for file in (self.output, *self.sides.values()):
                if file.torn:
                    say(f"{file.path}: the last line was cut short when an earlier run was killed; it is done again")
                if file.unreadable:
                    say(
                        f"{file.path}: {len(file.unreadable)} lines cannot be read; they are kept at the top of the file"
                    )
            self._earlier = [(kind, entry) for kind, file in self.sides.items() for entry in file.records]
            self._recorded = {key(record) for record in self.output.records} - {None}
            self.settled = self._recorded | {key(entry) for entry in self.sides["dropped"].records}
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "_Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self.output, *self.sides.values()):
            file.close()
            if file is not self.output and not _holds_something(file.path):
                file.path.unlink(missing_ok=True)
        if isinstance(error, InputError) and not _is_begun(self.output.path):
            self.output.path.unlink()
            manifest_path(self.output.path).unlink(missing_ok=True)
            if self._folder_is_new:
                with suppress(OSError):  # something else is in it by now
                    self.output.path.parent.rmdir()

    def add(self, item: Record, result: Record | Dropped) -> None:
        """Put one result on the disk."""
        if isinstance(result, Dropped):
            self.sides[result.kind].append({**item, **result.details, "reason": result.reason})
        else:
            self.output.append(result)
            self._recorded.add(self._key(item))
        if not isinstance(result, Dropped) or result.kind == "dropped":
            self.settled.add(self._key(item))

    def put_in_order(self, order: Callable[[Record], Any]) -> None:
        """Sort the records, and keep in the side files the newest entry of every item that has no record."""
        self.output.rewrite(sorted(self.output.records, key=order))
        old = Counter(kind for kind, _ in self._earlier)
        new = [(kind, entry) for kind, file in self.sides.items() for entry in file.records[old[kind] :]]
        newest = {self._key(entry): (kind, entry) for kind, entry in [*self._earlier, *new]}
        done = self._recorded | {None}
        for kind, file in self.sides.items():
            kept = [entry for of, (at, entry) in newest.items() if at == kind and of not in done]
            file.rewrite(sorted(kept, key=order))


def _require_distinct(keys: Sequence[Hashable], output: Path) -> None:
    if len(set(keys)) != len(keys):
        twice = next(of for of, count in Counter(keys).items() if count > 1)
        raise InputError(f"{output}: two items have the key {twice}; every item needs its own")


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
    begun = _is_begun(Path(output))
    # A run that failed before its first record does not fix the settings.
    if path.exists() and begun:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            made_with = dict(earlier["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; delete it to continue with the present settings") from error
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


def _is_begun(output: Path) -> bool:
    return _holds_something(output) or _holds_something(Path(f"{output}.dropped.jsonl"))


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
        return _read_finished(whole)[0]
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
    parts = [_read_finished(path) for _, _, path in shards]
    made = [(path, settings) for (_, _, path), (_, settings) in zip(shards, parts) if settings is not None]
    for path, settings in made[1:]:
        first, expected = made[0]
        if settings != expected:
            name = _differences(expected, settings)[0]
            raise DatasetError(
                f"{first} was made with {name}={expected.get(name)!r} and {path.name} with {name}={settings.get(name)!r}: "
                "make all shards with the same settings"
            )
    longest = max(len(records) for records, _ in parts)
    return [records[row] for row in range(longest) for records, _ in parts if row < len(records)]


def _read_finished(path: Path) -> tuple[list[Record], Record | None]:
    """The records of a finished output, and the settings it was made with if it has a manifest."""
    manifest = manifest_path(path)
    finished, settings = True, None
    if manifest.is_file():
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            finished, settings = content["finished"], dict(content.get("settings", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{manifest} is damaged; run the stage that writes {path.name} again") from error
    if not finished:
        raise DatasetError(f"{path} is not finished; run the stage that writes it again; it continues where it stopped")
    records = []
    for place, line in read_json_lines(path):
        if isinstance(line, str):
            raise DatasetError(f"{path}, line {place + 1}: {line}")
        records.append(line)
    return records, settings
