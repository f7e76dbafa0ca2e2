"""Bringing a gallery up to date with the pictures on the disk, batch by batch, so that it can be killed at any moment."""

import itertools
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from tbps_common.errors import GalleryError, ImageError, InputError
from tbps_common.images import SUFFIXES
from tbps_common.run.progress import progress_bar
from tbps_common.search.detect import Detector, Person
from tbps_common.search.gallery import Gallery, create_gallery, explained, list_galleries, merge, remove_rows
from tbps_common.search.metadata import Metadata
from tbps_common.search.retriever import Features, Retriever, encode_images

# What is lost at most when a run is killed; a commit of few rows costs more than their features.
_COMMIT_PICTURES, _COMMIT_SECONDS = 4096, 60.0

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


@dataclass
class Counts:
    """What an index command did, in rows; `skipped` counts files."""

    added: int = 0
    updated: int = 0
    removed: int = 0
    skipped: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"added {self.added}, updated {self.updated}, removed {self.removed}, skipped {self.skipped}, total {self.total}"


@dataclass(frozen=True)
class Pictures:
    """The picture files to index.

    Attributes:
        root: the folder that their names are relative to.
        files: real paths.
    """

    root: str
    files: list[str]


def find_images(folder: str | os.PathLike[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Paths of all images under a folder, sorted; hidden files and folders are left out.

    Linked folders are entered, each real folder once, so that a link upwards does not go round in circles.

    Returns:
        `folder` joined with the relative path of each image.

    Raises:
        GalleryError: the folder is absent or cannot be read, or there is no image.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise GalleryError(f"Image folder {root} does not exist; give the folder that holds the images.")
    seen: set[str] = set()
    found: list[str] = []
    for current, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(current)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(suffixes))
        found.extend(path for path in (os.path.join(current, name) for name in names) if os.path.isfile(path))
    if not found:
        raise GalleryError(f"There are no images under {root} (looked for {', '.join(suffixes)}); give another folder.")
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise GalleryError(f"Folder {error.filename} cannot be read ({error.strerror}); check its permissions.") from error


def list_pictures(source: str, suffixes: tuple[str, ...] = SUFFIXES) -> Pictures:
    """The pictures of a folder, searched with its sub-folders, or of a text file with one path per line.

    Raises:
        InputError: nothing is there.
    """
    if not os.path.isfile(source):
        files = find_images(source, suffixes)
        return Pictures(os.path.realpath(source), list(dict.fromkeys(map(os.path.realpath, files))))
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {source} is neither a folder nor a list of paths ({error})") from error
    files = list(dict.fromkeys(os.path.realpath(line.strip()) for line in lines if line.strip()))
    if not files:
        raise InputError(f"--images {source} lists no images: write one path per line")
    return Pictures(os.path.commonpath([os.path.dirname(file) for file in files]), files)


def update_gallery(
    out: str,
    model: Retriever,
    pictures: Pictures,
    *,
    metadata: Metadata | None = None,
    shard: tuple[int, int] = (0, 1),
    half: bool = False,
    detector: Detector | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Counts:
    """Encode the pictures that are new or changed, drop those whose file is gone, and keep the rest.

    A file counts as changed when its size or its time of change is another one than when it was encoded. Every few
    thousand pictures are one commit; whoever is killed goes on after the last one.

    Args:
        out: the gallery, made if it is not there.
        model: encodes.
        pictures: to index. Pictures of the gallery that are not among them stay, if their file is there.
        metadata: further columns, also for the pictures that are in the gallery already.
        shard: `(i, n)`: only the i-th of n parts, which do not depend on each other; all n may run at once.
        half: store float16, in a new gallery.
        detector: cuts persons out of the pictures and videos; otherwise a picture is one person.
        batch_size: pictures encoded at once.
        num_workers: threads that read pictures.

    Raises:
        GalleryError: the gallery cannot be used, or features are not finite.
        OSError: the disk is full, or the gallery cannot be written. What was committed stays.
    """
    settings = "" if detector is None else detector.settings
    gallery = create_gallery(out, model, pictures.root, half=half, detect=settings)
    if gallery.detect != settings:
        raise GalleryError(
            f"{out} was made with --detect {gallery.detect or 'left out'}: give the same flags, or write to another --out"
        )
    if metadata is not None:
        metadata.prepare(gallery)
    known = _stamps(gallery)
    wanted: dict[str, Stamp] = {}
    for file in pictures.files:
        name = gallery.stored_path(file)
        if _is_of_shard(name, shard):
            wanted[name] = _stamp(file)
    places = metadata.places(gallery) if metadata is not None else {}
    if metadata is not None and places and not any(name in wanted or name in known for name in places):
        raise InputError(
            f"--metadata {metadata.file}: none of its paths, such as {metadata.paths[0]}, is a picture of the gallery: write "
            f"them relative to {gallery.root}"
        )
    counts = Counts()
    gone = [
        name
        for name in known
        if name not in wanted and _is_of_shard(name, shard) and not os.path.isfile(gallery.file(name))
    ]
    if gone:
        remove_rows(gallery, gone)
        counts.removed += sum(known[name].rows for name in gone)
    todo = [name for name, stamp in wanted.items() if name not in known or known[name].stamp != stamp]
    counts.skipped = sum(
        name in known and known[name].rows == 0 and known[name].stamp == wanted[name] for name in wanted
    )
    pending = _Pending(gallery, known, wanted, counts, metadata, places)
    options = {"batch_size": batch_size, "num_workers": num_workers}
    with progress_bar(len(todo), unit="image" if detector is None else "file") as bar:
        if detector is None:
            batches = encode_images(model, [gallery.file(name) for name in todo], **options)
            for done, features, problems in batches if todo else ():
                pending.add([(todo[place], None) for place in done], features)
                for place, problem in problems:
                    bar.write(f"skipped: {problem}", file=sys.stderr)
                    pending.add_problem(todo[place], problem)
                pending.commit_when_due()
                bar.update(len(done) + len(problems))
        else:
            for name in todo:
                try:
                    _add_persons(pending, model, name, detector.persons(gallery.file(name)), options)
                except ImageError as error:
                    bar.write(f"skipped: {error}", file=sys.stderr)
                    pending.drop(name)
                    pending.add_problem(name, str(error))
                pending.commit_when_due()
                bar.update()
        pending.commit()
    if metadata is not None:
        for one in list_galleries(out):
            metadata.apply(one)
        present = {places[name] for name in places if name in wanted or name in known}
        strange = [path for place, path in enumerate(metadata.paths) if place not in present]
        if strange:
            print(
                f"note: {len(strange)} of {len(metadata.paths)} rows of {metadata.file} name no picture of this run, such as "
                f"{strange[0]}",
                file=sys.stderr,
            )
    _tidy_up(gallery)
    counts.total = len(gallery)
    return counts


def _tidy_up(gallery: Gallery) -> None:
    """Join small files, add new rows to the index, drop old versions; while another process writes, that is left to it."""
    with explained(gallery.path):
        gallery.table.checkout_latest()
        try:
            gallery.table.optimize(cleanup_older_than=timedelta(hours=1))
        except RuntimeError as error:
            if "concurrent transaction" not in str(error):
                raise
            gallery.table.checkout_latest()


def _add_persons(
    pending: "_Pending", model: Retriever, name: str, persons: Iterator[Person], options: dict[str, int | None]
) -> None:
    """Encode the persons of one file, a batch at a time; all of them come into one commit."""
    size, found = options["batch_size"] or model.batch_size, 0
    while chunk := list(itertools.islice(persons, size)):
        for done, features, _ in encode_images(model, [person.image for person in chunk], batch_size=size):
            pending.add([(name, chunk[place]) for place in done], features, first=found)
        found += len(chunk)
    if not found:
        pending.add_problem(name, "no person was found")


@dataclass(frozen=True)
class _Known:
    stamp: Stamp
    rows: int
    """With features."""


def _stamps(gallery: Gallery) -> dict[str, _Known]:
    known: dict[str, _Known] = {}
    with explained(gallery.path):
        query = gallery.table.search().select(["path", "size", "mtime_ns", "problem"])
        for batch in query.to_batches(1 << 16):
            columns = [batch[name].to_pylist() for name in ("path", "size", "mtime_ns", "problem")]
            for path, size, mtime, problem in zip(*columns):
                before = known[path].rows if path in known else 0
                known[path] = _Known((size, mtime), before + (problem is None))
    return known


def _stamp(file: str) -> Stamp:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, 0)  # it is reported when it is read
    return (status.st_size, status.st_mtime_ns)


def _is_of_shard(name: str, shard: tuple[int, int]) -> bool:
    return zlib.crc32(name.encode()) % shard[1] == shard[0]


@dataclass
class _Pending:
    """Rows that wait for the next commit."""

    gallery: Gallery
    known: dict[str, _Known]
    wanted: dict[str, Stamp]
    counts: Counts
    metadata: Metadata | None
    places: dict[str, int]
    records: list[dict[str, Any]] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def add(self, pictures: Sequence[tuple[str, Person | None]], features: Features, *, first: int = 0) -> None:
        """Rows of stored paths, or of persons found in them, which are numbered from `first` on."""
        for name, tensor in features.items():
            finite = torch.isfinite(tensor).flatten(1).all(dim=1)
            if not bool(finite.all()):
                bad = self.gallery.file(pictures[int((~finite).nonzero()[0])][0])
                raise GalleryError(
                    f"Feature {name} of {bad} holds NaN or infinity; check the image and the checkpoint."
                )
        for number, (name, person) in enumerate(pictures, start=first):
            cut = {} if person is None else {"key": f"{name}//{number}", "frame": person.frame, "box": person.box}
            self.records.append({**self._record(name, None), **cut})
        if pictures:
            self.features.append(features)

    def add_problem(self, name: str, problem: str) -> None:
        """A row for a file without features."""
        self.records.append(self._record(name, problem))

    def drop(self, name: str) -> None:
        """Forget the persons of a file that could be read only in part."""
        good = [record for record in self.records if record["problem"] is None]
        kept = torch.tensor([record["path"] != name for record in good], dtype=torch.bool)
        if self.features:
            joined = {one: torch.cat([part[one] for part in self.features])[kept] for one in self.features[0]}
            self.features = [joined] if len(kept) and bool(kept.any()) else []
        self.records = [record for record in self.records if record["path"] != name]

    def _record(self, name: str, problem: str | None) -> dict[str, Any]:
        size, mtime = self.wanted[name]
        return {"key": name, "path": name, "size": size, "mtime_ns": mtime, "problem": problem}

    def commit_when_due(self) -> None:
        if len(self.records) >= _COMMIT_PICTURES or time.monotonic() - self.since > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        if self.records:
            good: dict[str, list[bool]] = {}
            for record in self.records:
                good.setdefault(record["path"], []).append(record["problem"] is None)
            changed = [path for path in good if path in self.known]
            inserted = merge(self.gallery, self._table(), replaced=changed)
            # What another process has indexed meanwhile counts as replaced.
            replaced = sum(record["path"] not in self.known for record in self.records) - inserted
            self.counts.added -= replaced
            self.counts.updated += replaced
            for path in good:
                before = self.known[path].rows if path in self.known else 0
                now = sum(good[path])
                self.counts.updated += min(before, now)
                self.counts.added += max(0, now - before)
                self.counts.removed += max(0, before - now)
                self.counts.skipped += now == 0
        self.records, self.features, self.since = [], [], time.monotonic()

    def _table(self) -> pa.Table:
        """The rows with features, then those with a problem."""
        records = sorted(self.records, key=lambda record: record["problem"] is not None)
        good = sum(record["problem"] is None for record in records)
        columns: dict[str, Any] = {}
        schema = self.gallery.table.schema
        names = {one.name for one in self.gallery.features}
        extra: dict[str, list[Any]] = {}
        if self.metadata is not None:
            extra = self.metadata.values(self.gallery, [record["path"] for record in records], self.places)
        for item in schema:
            if item.name in names:
                values = torch.cat([part[item.name] for part in self.features]) if good else torch.empty(0)
                columns[item.name] = _lists(values, item.type, len(records) - good)
            elif item.name == "ann":
                first = self.gallery.features[0].name
                means = (
                    torch.cat([part[first].float().mean(dim=1) for part in self.features]) if good else torch.empty(0)
                )
                columns[item.name] = _lists(means, item.type, len(records) - good)
            elif item.name in extra:
                columns[item.name] = pa.array(extra[item.name], item.type)
            else:
                columns[item.name] = pa.array([record.get(item.name) for record in records], item.type)
        return pa.table(columns, schema=schema)


def _lists(values: Tensor, kind: Any, nulls: int) -> Any:
    """`[N, ...]` as N lists of fixed size, and some nulls after them."""
    dtype = torch.float16 if kind.value_type == pa.float16() else torch.float32
    flat = values.to(dtype).contiguous().view(-1).numpy()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)
    return pa.concat_arrays([lists, pa.nulls(nulls, kind)]) if nulls else lists
