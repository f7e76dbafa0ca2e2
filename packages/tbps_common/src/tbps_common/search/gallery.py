"""A gallery: a folder that LanceDB keeps, with one table of features for every model that indexed pictures into it.

A row is the picture of one person. Its columns:

* `key` (the primary key) and `path`: of the picture file, relative to the gallery's root; a file in which several
  persons were detected has several rows, with the keys `PATH//0`, `PATH//1`, ...;
* `size` and `mtime_ns`: of the file when it was encoded; any other stamp means that it changed;
* `problem`: why the file has no features, null where it has. Such rows keep a file from being tried again in every run;
* `frame` and `box` (left, top, right, bottom in pixels): where the person was cut out, null for a whole picture;
* `ann`: the mean of a picture's tokens, for the database's index of token sets;
* the model's features, each a list of fixed size (the shape is in the table's metadata), float32 or float16;
* the columns of `--metadata`.

A table per model and not columns per model: a model's pictures, their features and their metadata change in one commit,
no row is half empty because another model has not seen the picture yet, and a filter needs no join. What is stored twice
is small beside the features. LanceDB refuses concurrent commits that insert one key twice, so writers need no lock.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import torch
from torch import Tensor

from tbps_common.errors import GalleryError, InputError
from tbps_common.search.retriever import Feature, Features, Retriever

FORMAT = "tbps-gallery/2"
OWN_COLUMNS = ("key", "path", "size", "mtime_ns", "problem", "frame", "box", "ann")
CREATE = "tbps-index --model MODEL --images FOLDER --out"

_BLOCK_BYTES = 8 << 20
_DIGITS = 16
_MOST_FILTER = 10_000
_DATE = re.compile(
    r"(?<!timestamp )(?<!date )'(\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(?:\.\d+)?)?)?)'", re.IGNORECASE
)
# File names need not be Unicode, but a database's strings must: Python's stand-ins for single bytes (U+DC80 and
# following) are stored as characters for private use, and come back as what they were.
_TO_STORE = {0xDC00 + byte: 0xF700 + byte for byte in range(0x80, 0x100)}
_FROM_STORE = {stored: name for name, stored in _TO_STORE.items()}


@dataclass(frozen=True)
class Gallery:
    """The pictures that one model indexed.

    Attributes:
        path: the database folder (or its address on object storage).
        table: of LanceDB, as it was when it was opened.
        model: name of the model, as it was given when indexing.
        fingerprint: of the model.
        root: folder that the paths are relative to.
        features: what a row holds.
        detect: how persons were cut out of the pictures; empty for whole pictures.
    """

    path: str
    table: Any
    model: str
    fingerprint: str
    root: str
    features: tuple[Feature, ...]
    detect: str = ""

    def __len__(self) -> int:
        with explained(self.path):
            return int(self.table.count_rows("problem IS NULL"))

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The columns of the user's metadata."""
        inside = {*OWN_COLUMNS, *(feature.name for feature in self.features)}
        return {field.name: field.type for field in self.table.schema if field.name not in inside}

    def files(self) -> list[str]:
        """All picture files, in the order of the rows."""
        with explained(self.path):
            stored = self.table.search().where("problem IS NULL").select(["path"]).to_arrow()["path"].to_pylist()
        return [self.file(name) for name in dict.fromkeys(stored)]

    def file(self, stored: str) -> str:
        """Where the picture file of a stored path lies."""
        return os.path.normpath(os.path.join(self.root, stored.translate(_FROM_STORE)))

    def stored_path(self, file: str) -> str:
        """The name of a file in the gallery: its real path relative to the root's, so that links count once."""
        return os.path.relpath(os.path.realpath(file), os.path.realpath(self.root)).translate(_TO_STORE)


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        key: of the row.
        path: of the picture file.
        score: of the query and the picture.
        frame: of a video, counted from 0.
        box: left, top, right, bottom of the person in the file's picture, in pixels.
        data: the user's metadata.
    """

    key: str
    path: str
    score: float
    frame: int | None
    box: tuple[int, int, int, int] | None
    data: dict[str, Any]

    @property
    def shown_path(self) -> str:
        """The path as it can be printed: names of files need not be Unicode."""
        return self.path.encode("utf-8", "backslashreplace").decode("utf-8")


def list_galleries(path: str | os.PathLike[str], *, empty: bool = False) -> list[Gallery]:
    """The galleries of all models in a database.

    Args:
        path: of the database.
        empty: a database without any is no error.

    Raises:
        GalleryError: there is no database, it is damaged, or it is a file of the old format.
    """
    database = connect(path)
    found = [_opened(path, database, name) for name in _table_names(path, database)]
    galleries = [gallery for gallery in found if gallery is not None]
    if not galleries and not empty:
        raise GalleryError(f"{os.fspath(path)} holds no gallery: build one with {CREATE} {os.fspath(path)}")
    return galleries


def open_gallery(path: str | os.PathLike[str], model: Retriever) -> Gallery:
    """The gallery of a model.

    Raises:
        GalleryError: as `list_galleries`, or the model indexed nothing there.
    """
    # How scores are made is the model's affair: it may average another number of tokens than when it indexed.
    return replace(find_gallery(path, model.name, model.fingerprint), features=model.features)


def find_gallery(path: str | os.PathLike[str], name: str, fingerprint: str) -> Gallery:
    """The gallery of a model that is not loaded; errors as for `open_gallery`."""
    galleries = list_galleries(path)
    for gallery in galleries:
        if gallery.fingerprint == fingerprint:
            return gallery
    known = ", ".join(f"{gallery.model} ({gallery.fingerprint[:8]})" for gallery in galleries)
    raise GalleryError(
        f"{os.fspath(path)} holds no features of {name} ({fingerprint[:8]}), only those of {known}: use that model, or index "
        f"with tbps-index --model {name} --images FOLDER --out {os.fspath(path)}"
    )


def create_gallery(
    path: str | os.PathLike[str], model: Retriever, root: str, *, half: bool = False, detect: str = ""
) -> Gallery:
    """The gallery of a model, made if it is not there yet.

    Args:
        path: of the database.
        model: whose features it holds.
        root: folder of the pictures.
        half: store float16.
        detect: how persons are cut out of the pictures.

    Raises:
        GalleryError: `path` is no database.
        OSError: it cannot be written.
    """
    value = pa.float16() if half else pa.float32()
    fields = [
        pa.field("key", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"}),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("frame", pa.int64()),
        pa.field("box", pa.list_(pa.int32(), 4)),
        *(pa.field(one.name, pa.list_(value, _length(one))) for one in model.features),
    ]
    if len(model.features[0].shape) > 1:
        fields.append(pa.field("ann", pa.list_(pa.float32(), model.features[0].shape[-1])))
    about = {
        "format": FORMAT,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "root": os.path.realpath(root).translate(_TO_STORE),
        "features": json.dumps([asdict(one) for one in model.features]),
        "detect": detect,
    }
    name = f"{re.sub(r'[^a-z0-9]+', '', model.name.partition(':')[0].lower()) or 'model'}-{model.fingerprint[:_DIGITS]}"
    database = connect(path, create=True)
    gallery = _opened(path, database, name) if name in _table_names(path, database) else None
    if gallery is None:
        with explained(path):
            try:
                database.create_table(name, schema=pa.schema(fields, metadata=about))
            except (RuntimeError, ValueError) as error:
                if "already exists" not in str(error):  # another process was faster
                    raise
        gallery = _opened(path, database, name)
    assert gallery is not None
    return gallery


def move_root(path: str | os.PathLike[str], root: str) -> None:
    """Record, for the galleries of all models, that the folder of the pictures lies at another place now.

    Raises:
        InputError: none of the pictures lies there.
        OSError: the gallery cannot be written.
    """
    galleries = list_galleries(path)
    for gallery in galleries:
        files = replace(gallery, root=os.path.realpath(root)).files()
        if files and not any(map(os.path.isfile, files)):
            raise InputError(f"--root {root}: none of the pictures of {os.fspath(path)} lies there, such as {files[0]}")
    for gallery in galleries:
        update = {"path": "path", "metadata": {"root": os.path.realpath(root).translate(_TO_STORE)}}
        with explained(path):
            gallery.table.update_field_metadata(update)


def read_rows(gallery: Gallery, rows: Sequence[int]) -> tuple[list[dict[str, Any]], Features]:
    """Of some rows, in the order given: all columns but the features, and the features."""
    others = [name for name in gallery.table.schema.names if name not in {one.name for one in gallery.features}]
    with explained(gallery.path):
        columns = [*others, *(one.name for one in gallery.features)]
        table = gallery.table.take_row_ids(list(rows)).select(columns).with_row_id().to_arrow()
    places = {row: place for place, row in enumerate(table["_rowid"].to_pylist())}
    table = table.take([places[row] for row in rows])
    return table.select(others).to_pylist(), features_of(gallery, table.combine_chunks())


def hits_of(gallery: Gallery, rows: Sequence[int], scores: Sequence[float]) -> list[Hit]:
    """What is known of some rows, as hits."""
    if not rows:
        return []
    found = []
    for record, score in zip(read_rows(gallery, rows)[0], scores):
        box = tuple(record["box"]) if record["box"] else None
        data = {name: record[name] for name in gallery.columns}
        found.append(Hit(record["key"], gallery.file(record["path"]), score, record["frame"], box, data))
    return found


def feature_blocks(gallery: Gallery, condition: str | None) -> Iterator[tuple[Tensor, Features]]:
    """Row numbers and features of all rows that have some, a few megabytes at a time."""
    names = [one.name for one in gallery.features]
    size = sum(
        gallery.table.schema.field(one.name).type.value_type.bit_width // 8 * _length(one) for one in gallery.features
    )
    with explained(gallery.path):
        query = gallery.table.search().select(["problem", *names]).with_row_id(True)
        if condition:
            query = query.where(condition)
        for batch in query.to_batches(max(48, _BLOCK_BYTES // size)):
            if batch["problem"].null_count < len(batch):
                batch = batch.filter(batch["problem"].is_null())
            if len(batch):
                yield torch.from_numpy(batch["_rowid"].to_numpy().astype("int64")), features_of(gallery, batch)


def features_of(gallery: Gallery, batch: Any) -> Features:
    """The features in rows of the table."""
    found = {}
    for one in gallery.features:
        column = batch[one.name]
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        found[one.name] = torch.from_dlpack(column.flatten()).view(-1, *one.shape)
    return found


def check_filter(gallery: Gallery, where: str | None) -> str | None:
    """The user's condition, safe to hand to the database, which evaluates conditions only and reads no files for them.

    Raises:
        InputError: it is no condition on the gallery's columns.
    """
    if where is None:
        return None
    outside = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`", " ", where)
    if not where.strip() or len(where) > _MOST_FILTER:
        raise InputError(f"--where must be a condition of 1 to {_MOST_FILTER} characters, such as \"camera = 'cam_a'\"")
    if any(mark in outside for mark in (";", "--", "/*", "'", '"', "`")) or not _is_balanced(outside):
        raise InputError(
            f"--where {where!r} must be one condition, without comments, ';', open quotation marks or open brackets"
        )
    # SQL compares a date with text, this database wants to be told that the text is one.
    dated = _DATE.sub(lambda found: f"timestamp '{found[1]}{'' if found[3] or not found[2] else ':00'}'", where)
    problem: Exception | None = None
    for condition in dict.fromkeys(
        (f"({where})", f"({dated})")
    ):  # in brackets, or words after its end would be ignored
        try:
            gallery.table.search().where(condition).select(["key"]).explain_plan()
            return condition
        except Exception as error:
            problem = error
    kinds = ", ".join(f"{name} ({kind})" for name, kind in {"path": "string", **gallery.columns}.items())
    reason = (
        re.sub(r",? ?/\S*\.rs.*", "", str(problem).splitlines()[0])
        .removeprefix("Invalid input, ")
        .split(" Valid fields")[0]
    )
    raise InputError(f"--where {where!r} cannot be used ({reason.rstrip('.')}): the columns are {kinds}") from problem


def _is_balanced(text: str) -> bool:
    depth = 0
    for mark in text:
        depth += (mark == "(") - (mark == ")")
        if depth < 0:
            return False
    return depth == 0


def merge(gallery: Gallery, rows: pa.Table, *, replaced: Sequence[str] = ()) -> int:
    """Insert rows, or replace those of the same key, in one commit; returns how many were inserted.

    Args:
        gallery: where.
        rows: all columns.
        replaced: stored paths whose other rows go.
    """
    builder = gallery.table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
    if replaced:
        builder = builder.when_not_matched_by_source_delete(_in("path", replaced))
    with explained(gallery.path):
        result = builder.execute(rows, on_bad_vectors="null")  # the features of files with a problem are null
    return int(result.num_inserted_rows)


def remove_rows(gallery: Gallery, paths: Sequence[str]) -> None:
    """Delete the rows of some stored paths."""
    with explained(gallery.path):
        for start in range(0, len(paths), 1000):
            gallery.table.delete(_in("path", paths[start : start + 1000]))


def _in(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """A value as SQL has it."""
    return "'" + value.replace("'", "''") + "'"


def _length(feature: Feature) -> int:
    length = 1
    for size in feature.shape:
        length *= size
    return length


def connect(path: str | os.PathLike[str], *, create: bool = False) -> Any:
    """Open a database, which must be there unless `create`."""
    place = os.fspath(path)
    if place.startswith("memory:"):
        raise GalleryError(
            f"{place} would be forgotten when the command ends: give a folder, or s3://BUCKET/people.lance"
        )
    if "://" not in place:
        if os.path.isfile(place):
            with open(place, "rb") as file:
                old = any(name in file.read(4096) for name in (b"tbps-gallery/1", b"diana-index/1"))
            kind = "is a gallery of the old format" if old else "is a file, not a gallery"
            anew = os.path.splitext(place)[0] + ".lance"
            raise GalleryError(f"{place} {kind}, which is a folder now: make it anew with {CREATE} {anew}")
        if not create and not os.path.isdir(place):
            raise GalleryError(f"Gallery {place} does not exist; build it with {CREATE} {place}")
    with explained(path):
        return lancedb.connect(place)


def _table_names(path: str | os.PathLike[str], database: Any) -> list[str]:
    names: list[str] = []
    page = None
    with explained(path):
        while page is None or page:
            response = database.list_tables(page_token=page, limit=100)
            names, page = names + response.tables, response.page_token or ""
    return names


def _opened(path: str | os.PathLike[str], database: Any, name: str) -> Gallery | None:
    """The gallery of a table; None if the table is not ours, or its writer was killed before it was there."""
    if _is_half_made(path, name):
        return None
    with explained(path):
        table = database.open_table(name)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if about.get("format") != FORMAT:
        return None
    try:
        features = tuple(Feature(**{**one, "shape": tuple(one["shape"])}) for one in json.loads(about["features"]))
        moved = (table.schema.field("path").metadata or {}).get(b"root", b"").decode()
        root = (moved or about["root"]).translate(_FROM_STORE)
        return Gallery(os.fspath(path), table, about["model"], about["fingerprint"], root, features, about["detect"])
    except (KeyError, TypeError, ValueError) as error:
        raise GalleryError(
            f"{os.fspath(path)} has a damaged table {name} ({error}): delete it and index again"
        ) from error


def _is_half_made(path: str | os.PathLike[str], name: str) -> bool:
    """Whether a local table has no version yet."""
    folder = Path(path) / f"{name}.lance"
    return folder.is_dir() and not any((folder / "_versions").glob("*.manifest"))


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the database into one sentence.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        GalleryError: anything else, as a rule a damaged file.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
        place, text = os.fspath(path), str(error)
        for number, words in _SYSTEM.items():
            if words in text or getattr(error, "errno", None) == number:
                raise OSError(number, os.strerror(number), place) from error
        reason = re.sub(r",? ?/\S*\.rs.*", "", (text.splitlines() or [type(error).__name__])[0])[:300]
        remedy = "if it is damaged, delete the folder and index again"
        if "://" in place:
            remedy = "check the address, and the credentials in the environment (docs/search.md)"
        raise GalleryError(f"{place} cannot be used ({reason}): {remedy}") from error


_SYSTEM = {
    errno.ENOSPC: "No space left on device",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EFBIG: "File too large",
    errno.EDQUOT: "quota exceeded",
}
