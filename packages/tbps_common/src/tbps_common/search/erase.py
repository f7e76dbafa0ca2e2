"""Deleting pictures from a gallery for good."""

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pyarrow as pa

from tbps_common.errors import InputError
from tbps_common.search.ann import SMALLEST, build_index
from tbps_common.search.gallery import Gallery, check_filter, connect, explained, list_galleries, quoted
from tbps_common.search.rank import has_index


def erase(path: str | os.PathLike[str], files: Sequence[str], where: str | None, *, from_disk: bool = False) -> int:
    """Delete pictures from the galleries of all models, so that nothing of their features stays on the disk.

    Each table is written anew without them, and its older versions are removed.

    Args:
        path: of the database.
        files: picture files, or folders with all below them.
        where: SQL condition; with `files`, both must hold.
        from_disk: delete the picture files too.

    Returns:
        How many pictures went, counted once for all models.

    Raises:
        InputError: `where` is no condition, or a file is not in any gallery.
        OSError: a file cannot be deleted.
    """
    keys: dict[str, str] = {}
    chosen: list[tuple[Gallery, str]] = []
    named = set()
    for gallery in list_galleries(path):
        conditions: list[str | None] = []
        if where is not None:
            conditions.append(check_filter(gallery, where))
        if files:
            stored = [gallery.stored_path(file) for file in files]
            each = [f"path = {quoted(name)} OR starts_with(path, {quoted(name + '/')})" for name in stored]
            named |= {file for file, one in zip(files, each) if gallery.table.count_rows(one)}
            conditions.append(f"({' OR '.join(each)})")
        condition = " AND ".join(filter(None, conditions))
        with explained(path):
            found = gallery.table.search().where(condition).select(["key", "path"]).to_arrow()
        keys |= dict(zip(found["key"].to_pylist(), map(gallery.file, found["path"].to_pylist())))
        chosen.append((gallery, condition))
    strange = [file for file in files if file not in named]
    if strange:
        raise InputError(f"--path {strange[0]} is not in {os.fspath(path)}: nothing was deleted")
    for gallery, condition in chosen:
        _write_without(gallery, condition)
    if from_disk:
        for file in sorted(set(keys.values())):
            Path(file).unlink(missing_ok=True)
    return len(keys)


def _write_without(gallery: Gallery, condition: str) -> None:
    indexed = has_index(gallery)
    with explained(gallery.path):
        if gallery.table.count_rows(condition):
            gallery.table.delete(condition)
            schema = gallery.table.schema
            kept = pa.RecordBatchReader.from_batches(schema, gallery.table.search().to_batches())
            connect(gallery.path).create_table(
                gallery.table.name,
                data=kept,
                schema=schema,
                mode="overwrite",
                on_bad_vectors="null",  # the features of files with a problem are null
            )
            gallery.table.checkout_latest()
            if indexed and len(gallery) >= SMALLEST:
                build_index(gallery)
        with warnings.catch_warnings():  # that readers of older versions will fail is what is wanted here
            warnings.simplefilter("ignore")
            gallery.table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
