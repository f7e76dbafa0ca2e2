"""Looking at a data set before a long run: sizes beside the published ones, and what is missing, broken or odd."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from tbps_common.datasets.contents import Contents, read_contents
from tbps_common.datasets.published import PUBLISHED, Size
from tbps_common.datasets.table import format_table
from tbps_common.errors import DatasetError
from tbps_common.images import find_damage, read_image

ImageCheck = Literal["none", "exist", "decode"]
CLIP_LENGTH = 77
EXAMPLES = 10
BATCH = 100  # images per task: a task per image would cost more than looking whether the image exists


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
class ImageFindings:
    """What the look at the image files found: path -> cause, per kind of fault."""

    mode: ImageCheck
    checked: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, str] = field(default_factory=dict)  # readable, a part is black or grey
    outside: dict[str, str] = field(default_factory=dict)  # a link to a file elsewhere


@dataclass
class Report:
    """Result of `check_dataset`; the data are usable if there is no problem."""

    dataset: str
    root: str
    columns: tuple[str, ...]
    rows: list[SizeRow]
    counts: dict[str, int | None]
    images: ImageFindings
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
                "mode": self.images.mode,
                "checked": self.images.checked,
                **{
                    kind: {"count": len(found), "first": dict(list(found.items())[:EXAMPLES])}
                    for kind, found in _faults(self.images).items()
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
        if self.images.mode != "none":
            done = {"exist": "looked for", "decode": "decoded"}[self.images.mode]
            lines.append(f"images {done}: {self.images.checked:,}")
        for kind, found in _faults(self.images).items():
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
    contents = read_contents(name, root)
    published = PUBLISHED[name]
    rows = []
    for subset, found in contents.sizes.items():
        sizes = published.get(subset, ())
        rows.append(SizeRow(subset, found, sizes + (None,) * (len(found) - len(sizes))))
    counts: dict[str, int | None] = dict(contents.counts)
    counts["empty captions"] = sum(not caption.strip() for caption in contents.captions)
    counts["duplicate captions"] = len(contents.captions) - len(set(contents.captions))
    counts[f"captions longer than {CLIP_LENGTH} CLIP tokens"] = count_long_captions(
        contents.captions, progress=progress
    )
    findings = _look_at_images(contents, images, workers, progress)
    problems = list(contents.problems)
    for kind, found in _faults(findings).items():
        if found and kind != "truncated":
            problems.append(f"{len(found)} of {findings.checked} images are {_PROBLEM[kind]}.")
    return Report(name, os.fspath(root), contents.columns, rows, counts, findings, problems)


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


_PROBLEM = {
    "missing": "missing",
    "corrupt": "corrupt",
    "outside": "links to files outside their image folder; link the folder instead",
}


def _faults(images: ImageFindings) -> dict[str, dict[str, str]]:
    return {kind: getattr(images, kind) for kind in ("missing", "corrupt", "truncated", "outside")}


def _look_at_images(contents: Contents, mode: ImageCheck, workers: int | None, progress: bool) -> ImageFindings:
    findings = ImageFindings(mode)
    if mode == "none":
        return findings
    real_folder = {folder: os.path.realpath(folder) for folder in set(contents.images.values())}

    def examine(batch: list[str]) -> list[tuple[str, str, str | None]]:
        found: list[tuple[str, str, str | None]] = []
        for path in batch:
            if not os.path.isfile(path):
                cause = "it is not a file" if os.path.exists(path) else "the file does not exist"
                found.append((path, "missing", cause))
            elif os.path.islink(path) and not _inside(os.path.realpath(path), real_folder[contents.images[path]]):
                found.append((path, "outside", f"links to {os.path.realpath(path)}"))
            elif mode == "decode":
                found.append((path, "corrupt", find_damage(path)))
        return found

    paths = list(contents.images)
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        results = pool.map(examine, batches)
        for batch, found in zip(batches, _bar(results, f"images (by {BATCH})", progress, len(batches))):
            findings.checked += len(batch)
            for path, kind, cause in found:
                if cause is not None:
                    getattr(findings, kind)[path] = cause
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C is not to wait for a million images
    # After the threads have ended: tolerating truncation is a process-wide switch.
    for path in list(findings.corrupt):
        try:
            read_image(path)
        except DatasetError:
            continue
        findings.truncated[path] = findings.corrupt.pop(path)
    return findings


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _bar(items: Iterable[Any], title: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=title, total=total, disable=None if progress else True, leave=False)
