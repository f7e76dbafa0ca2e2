"""Looking at a data set before a long run: sizes beside the published ones, and what is missing, broken or odd."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from tbps_common.datasets.inventory import PUBLISHED, Inventory, Size, take_inventory
from tbps_common.datasets.table import format_table
from tbps_common.errors import DatasetError
from tbps_common.images import find_damage, read_image

ImageCheck = Literal["none", "exist", "decode"]
ImageFaults = dict[str, dict[str, str]]
"""Kind of fault -> path -> cause."""

CLIP_LENGTH = 77
EXAMPLES = 10
BATCH = 100  # images per task: a task per image would cost more than looking whether the image exists

# What makes the data unusable, as the end of a sentence. A truncated image does not: it is read, a part black or grey.
_PROBLEM = {
    "missing": "missing",
    "corrupt": "corrupt",
    "outside": "links to files outside their image folder; link the folder instead",
}


@dataclass
class SizeRow:
    """Counts of one subset beside the published ones; `verdict` is "-" where nothing is published."""

    subset: str
    found: tuple[int, ...]
    published: tuple[Size | None, ...]

    @property
    def verdict(self) -> str:
        known = [(size, count) for size, count in zip(self.published, self.found) if size is not None]
        if not known:
            return "-"
        return "OK" if all(size.fits(count) for size, count in known) else "DIFFERS"


@dataclass
class Report:
    """Result of `check_dataset`; the data are usable if there is no problem."""

    dataset: str
    root: str
    columns: tuple[str, ...]
    rows: list[SizeRow]
    counts: dict[str, int | None]
    image_check: ImageCheck
    images_checked: int
    image_faults: ImageFaults
    problems: list[str]

    @property
    def usable(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain values for a file; the lists of images hold the first ten."""
        return {
            "dataset": self.dataset,
            "root_dir": self.root,
            "usable": self.usable,
            "sizes": [
                {
                    "subset": row.subset,
                    "found": dict(zip(self.columns, row.found)),
                    "published": {c: size.value for c, size in zip(self.columns, row.published) if size is not None},
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
            "counts": self.counts,
            "images": {
                "mode": self.image_check,
                "checked": self.images_checked,
                **{
                    kind: {"count": len(found), "first": dict(list(found.items())[:EXAMPLES])}
                    for kind, found in self.image_faults.items()
                },
            },
            "problems": self.problems,
        }

    def as_text(self) -> str:
        """The size table, the findings and the verdict, for people."""
        table = [
            (
                row.subset,
                *row.found,
                " / ".join("-" if size is None else str(size) for size in row.published),
                row.verdict,
            )
            for row in self.rows
        ]
        lines = [
            f"{self.dataset} in {self.root}",
            format_table(("subset", *self.columns, "published", "verdict"), table),
        ]
        for what, count in self.counts.items():
            lines.append(f"{what}: {'not counted (install open_clip_torch)' if count is None else f'{count:,}'}")
        if self.image_check != "none":
            done = {"exist": "looked for", "decode": "decoded"}[self.image_check]
            lines.append(f"images {done}: {self.images_checked:,}")
        for kind, found in self.image_faults.items():
            if found:
                lines.append(f"{kind} images: {len(found):,}")
                lines += [f"  {path}: {cause}" for path, cause in list(found.items())[:EXAMPLES]]
                lines += ["  ..."] if len(found) > EXAMPLES else []
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("usable" if self.usable else "not usable")
        return "\n".join(lines)


def check_dataset(
    name: str,
    root: str | os.PathLike[str],
    images: ImageCheck = "exist",
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Load a data set by its reader and look at its sizes, captions, ids and images.

    Args:
        name: CUHK-PEDES, ICFG-PEDES, RSTPReid, finetune, SDA, SynCPR, ITCPR, ChatPedes or MALS.
        root: the folder given to the commands that train on it; for SynCPR, ITCPR, ChatPedes and MALS also the folder
            of the data set itself.
        images: do not look at image files, see that they exist, or decode every one.
        workers: threads that look at images; as many as processors, at most 8, by default.
        progress: show bars on a terminal.

    Raises:
        DatasetError: the annotation files cannot be read at all.
    """
    inventory = take_inventory(name, root)
    rows = []
    for subset, found in inventory.sizes.items():
        sizes = PUBLISHED[name].get(subset, ())
        rows.append(SizeRow(subset, found, sizes + (None,) * (len(found) - len(sizes))))
    captions = inventory.captions
    counts: dict[str, int | None] = {
        **inventory.counts,
        "empty captions": sum(not caption.strip() for caption in captions),
        "duplicate captions": len(captions) - len(set(captions)),
        f"captions longer than {CLIP_LENGTH} CLIP tokens": count_long_captions(captions, progress=progress),
    }
    faults = _look_at_images(inventory, images, workers, progress)
    checked = 0 if images == "none" else len(inventory.images)
    problems = list(inventory.problems)
    for kind, words in _PROBLEM.items():
        if faults[kind]:
            problems.append(f"{len(faults[kind])} of {checked} images are {words}.")
    return Report(name, os.fspath(root), inventory.columns, rows, counts, images, checked, faults, problems)


def count_long_captions(captions: Iterable[str], limit: int = CLIP_LENGTH, progress: bool = False) -> int | None:
    """Captions with more than `limit` CLIP tokens, start and end token included; `None` without open_clip."""
    # Each token stands for at least one character of plain text, which settles most short captions at once.
    unsettled = [caption for caption in captions if len(caption) > limit - 2 or not caption.isascii()]
    if not unsettled:
        return 0
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer()
    return sum(len(tokenizer.encode(caption)) > limit - 2 for caption in _bar(unsettled, "counting tokens", progress))


def _look_at_images(inventory: Inventory, mode: ImageCheck, workers: int | None, progress: bool) -> ImageFaults:
    faults: ImageFaults = {"missing": {}, "corrupt": {}, "truncated": {}, "outside": {}}
    if mode == "none":
        return faults
    real_folder = {folder: os.path.realpath(folder) for folder in set(inventory.images.values())}

    def examine(batch: list[str]) -> list[tuple[str, str, str | None]]:
        found: list[tuple[str, str, str | None]] = []
        for path in batch:
            if not os.path.isfile(path):
                cause = "it is not a file" if os.path.exists(path) else "the file does not exist"
                found.append((path, "missing", cause))
            elif os.path.islink(path) and not _inside(os.path.realpath(path), real_folder[inventory.images[path]]):
                found.append((path, "outside", f"links to {os.path.realpath(path)}"))
            elif mode == "decode":
                found.append((path, "corrupt", find_damage(path)))
        return found

    paths = list(inventory.images)
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        results = pool.map(examine, batches)
        for found in _bar(results, f"images (by {BATCH})", progress, len(batches)):
            for path, kind, cause in found:
                if cause is not None:
                    faults[kind][path] = cause
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C is not to wait for a million images
    # After the threads have ended: tolerating truncation is a process-wide switch.
    for path in list(faults["corrupt"]):
        try:
            read_image(path)
        except DatasetError:
            continue
        faults["truncated"][path] = faults["corrupt"].pop(path)
    return faults


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _bar(items: Iterable[Any], title: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    return tqdm(items, desc=title, total=total, disable=None if progress else True, leave=False)
