"""Looking at a data set before a long run: sizes beside the published ones, and what is missing, broken or odd."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from tbps_common.datasets.inventory import INVENTORIES, PUBLISHED, Inventory
from tbps_common.datasets.table import format_table
from tbps_common.errors import DatasetError
from tbps_common.images import find_damage, read_image

ImageCheck = Literal["none", "exist", "decode"]

CLIP_LENGTH = 77
EXAMPLES = 10
BATCH = 100  # images per task: a task per image would cost more than looking whether the image exists

# Kinds of faults; what makes the data unusable is the end of a sentence. A truncated image does not: it is read, a part
# black or grey.
IMAGE_FAULTS = {
    "missing": "missing",
    "corrupt": "corrupt",
    "truncated": "",
    "outside": "links to files outside their image folder; link the folder instead",
}


def check_dataset(
    name: str,
    root: str | os.PathLike[str],
    images: ImageCheck = "exist",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Load a data set by its reader and look at its sizes, captions, ids and images.

    Args:
        name: CUHK-PEDES, ICFG-PEDES, RSTPReid, finetune, SDA, SynCPR, ITCPR, ChatPedes or MALS.
        root: the folder given to the commands that train on it; for SynCPR, ITCPR, ChatPedes and MALS also the folder
            of the data set itself.
        images: do not look at image files, see that they exist, or decode every one.
        workers: threads that look at images; as many as processors, at most 8, by default.
        progress: show bars on a terminal.

    Returns:
        What `--json` writes: `usable` (there are no `problems`), `sizes` beside the published ones (`verdict` is "-" where
        nothing is published), `counts`, and `images` with the number and the first ten of every kind of fault.

    Raises:
        DatasetError: the annotation files cannot be read at all.
    """
    inventory = INVENTORIES[name](Path(root))
    sizes = []
    for subset, counts in inventory.sizes.items():
        found = dict(zip(inventory.columns, counts))
        published = {column: size for column, size in zip(found, PUBLISHED[name].get(subset, ())) if size is not None}
        verdict = "OK" if all(size.fits(found[column]) for column, size in published.items()) else "DIFFERS"
        sizes.append(
            {
                "subset": subset,
                "found": found,
                "published": {column: size.value for column, size in published.items()},
                "verdict": verdict if published else "-",
            }
        )
    captions = inventory.captions
    findings: dict[str, int | None] = {
        **inventory.counts,
        "empty captions": sum(not caption.strip() for caption in captions),
        "duplicate captions": len(captions) - len(set(captions)),
        f"captions longer than {CLIP_LENGTH} CLIP tokens": count_long_captions(captions, progress=progress),
    }
    faults = _look_at_images(inventory, images, workers, progress)
    checked = 0 if images == "none" else len(inventory.images)
    problems = list(inventory.problems)
    if not inventory.images:
        problems.append(f"{name} in {os.fspath(root)} holds no record.")
    for kind, words in IMAGE_FAULTS.items():
        if words and faults[kind]:
            problems.append(f"{len(faults[kind])} of {checked} images are {words}.")
    return {
        "dataset": name,
        "root_dir": os.fspath(root),
        "usable": not problems,
        "sizes": sizes,
        "counts": findings,
        "images": {
            "mode": images,
            "checked": checked,
            **{
                kind: {"count": len(found), "first": dict(list(found.items())[:EXAMPLES])}
                for kind, found in faults.items()
            },
        },
        "problems": problems,
    }


def as_text(report: dict[str, Any]) -> str:
    """The size table, the findings and the verdict of `check_dataset`, for people."""
    columns = list(report["sizes"][0]["found"]) if report["sizes"] else []
    table = []
    for row in report["sizes"]:
        sizes = PUBLISHED[report["dataset"]].get(row["subset"], ())
        published = " / ".join("-" if size is None else str(size) for size, _ in zip_longest(sizes, columns))
        table.append((row["subset"], *row["found"].values(), published, row["verdict"]))
    lines = [
        f"{report['dataset']} in {report['root_dir']}",
        format_table(("subset", *columns, "published", "verdict"), table),
    ]
    for what, count in report["counts"].items():
        lines.append(f"{what}: {'not counted (install open_clip_torch)' if count is None else f'{count:,}'}")
    images = report["images"]
    if images["mode"] != "none":
        lines.append(f"images {'looked for' if images['mode'] == 'exist' else 'decoded'}: {images['checked']:,}")
    for kind in IMAGE_FAULTS:
        if images[kind]["count"]:
            lines.append(f"{kind} images: {images[kind]['count']:,}")
            lines += [f"  {path}: {cause}" for path, cause in images[kind]["first"].items()]
            lines += ["  ..."] if images[kind]["count"] > EXAMPLES else []
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("usable" if report["usable"] else "not usable")
    return "\n".join(lines)


def count_long_captions(captions: Iterable[str], progress: bool = False) -> int | None:
    """Captions with more than 77 CLIP tokens, start and end token included; `None` without open_clip."""
    # Each token stands for at least one character of plain text, which settles most short captions at once.
    unsettled = [caption for caption in captions if len(caption) > CLIP_LENGTH - 2 or not caption.isascii()]
    if not unsettled:
        return 0
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer()
    return sum(
        len(tokenizer.encode(caption)) > CLIP_LENGTH - 2 for caption in _bar(unsettled, "counting tokens", progress)
    )


def _look_at_images(
    inventory: Inventory, mode: ImageCheck, workers: int | None, progress: bool
) -> dict[str, dict[str, str]]:
    """Kind of fault -> path -> cause."""
    faults: dict[str, dict[str, str]] = {kind: {} for kind in IMAGE_FAULTS}
    if mode == "none":
        return faults
    real_folder = {folder: os.path.realpath(folder) for folder in set(inventory.images.values())}

    def examine(batch: list[str]) -> list[tuple[str, str, str | None]]:
        found: list[tuple[str, str, str | None]] = []
        for path in batch:
            if not os.path.isfile(path):
                cause = "it is not a file" if os.path.exists(path) else "the file does not exist"
                found.append((path, "missing", cause))
            elif os.path.islink(path) and not Path(path).resolve().is_relative_to(real_folder[inventory.images[path]]):
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


def _bar(items: Iterable[Any], title: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    return tqdm(items, desc=title, total=total, disable=None if progress else True, leave=False)
