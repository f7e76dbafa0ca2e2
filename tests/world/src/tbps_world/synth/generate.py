"""Draw the pictures of the chosen layouts, write their files, and leave a manifest when everything is in place."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_world.synth.drawing import Seen
from tbps_world.synth.layouts.base import Layout, Mask, SeenPictures
from tbps_world.synth.layouts.registry import LAYOUTS
from tbps_world.synth.lexicon import lexicon
from tbps_world.synth.streams import WORLD_VERSION
from tbps_world.synth.world import Picture, Settings, World, draw_picture

MANIFEST = "manifest.json"
LEXICON = "lexicon.txt"
_MADE_BY = "tbps-synth"
_STAGING = ".tbps-synth-unfinished"
_PICTURES_PER_TASK = 24
_PICTURES_PER_WORKER = 150
"""Fewer pictures than this are drawn sooner than another process starts."""


@dataclass(frozen=True)
class _Task:
    """One picture and all its files, absolute: several layouts may show the same picture."""

    picture: Picture
    images: tuple[str, ...]
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class _Done:
    key: tuple[str, str, int]
    seen: Seen
    digest: str


def generate(
    out: Path,
    settings: Settings,
    layouts: Sequence[str],
    *,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int], object] = lambda drawn: None,
    announce: Callable[[int], object] = lambda total: None,
) -> tuple[dict[str, Any], bool]:
    """Write the layouts of a world under a folder.

    All files are written beside their places first and moved when everything is there; the manifest comes last. A
    folder without a manifest is therefore not a finished world, and running again makes it one.

    Args:
        out: the world's folder; made if absent.
        settings: what decides every pixel and word.
        layouts: names from `LAYOUTS`.
        workers: processes that draw; the result does not depend on it.
        force: draw again although the same world is there, and replace another world.
        progress: called with the number of pictures finished since the last call.
        announce: called once with the number of pictures to draw.

    Returns:
        The manifest, and whether anything was drawn (False: the same world was already there).

    Raises:
        InputError: the folder holds other files or another world, or an unknown layout is asked for.
    """
    names = _closed(layouts)
    earlier = _earlier_manifest(out)
    if earlier is not None and not force:
        if earlier["settings"] != asdict(settings) or earlier["version"] != WORLD_VERSION:
            raise InputError(
                f"{out} holds a synthetic world of other settings ({_summary(earlier['settings'])}): choose another "
                "--out, or give --force to replace it."
            )
        if set(names) <= set(earlier["layouts"]):
            return earlier, False
    if earlier is not None and earlier["settings"] == asdict(settings):
        names = [name for name in LAYOUTS if name in names or name in earlier["layouts"]]
    chosen = [LAYOUTS[name] for name in names]
    world = World(settings)
    with _staging(out) as staging:
        (staging / LEXICON).write_text("\n".join(lexicon()) + "\n", encoding="utf-8", newline="\n")
        tasks, owners = _tasks(world, chosen, staging)
        announce(len(tasks))
        seen: dict[tuple[str, str, int], Seen] = {}
        digests: dict[tuple[str, str, int], str] = {}
        for batch in _drawn(tasks, settings, workers):
            for done in batch:
                seen[done.key], digests[done.key] = done.seen, done.digest
            progress(len(batch))
        shown = SeenPictures(seen)
        summaries = {
            layout.name: _annotate(world, layout, shown, owners[layout.name], digests, staging) for layout in chosen
        }
        manifest = {
            "made_by": _MADE_BY,
            "version": WORLD_VERSION,
            "settings": asdict(settings),
            "layouts": summaries,
            "lexicon_words": len(lexicon()),
        }
        _install(
            staging, out, chosen, [LAYOUTS[name] for name in (earlier or {}).get("layouts", {}) if name in LAYOUTS]
        )
    write_json(out / MANIFEST, manifest)
    return manifest, True


def _closed(layouts: Sequence[str]) -> list[str]:
    """Return the layouts and those they need, in the order of the registry.

    Raises:
        InputError: a name is unknown.
    """
    wanted: set[str] = set()
    for name in layouts:
        if name not in LAYOUTS:
            raise InputError(f"--layouts {name} is unknown: choose from {', '.join(LAYOUTS)}, or all.")
        wanted |= {name, *LAYOUTS[name].needs}
    return [name for name in LAYOUTS if name in wanted]


def _earlier_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of the world in this folder, None for an empty, absent or unfinished one.

    Raises:
        InputError: the folder, or its manifest, is not ours.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder.")
    if not out.is_dir():
        return None
    path = out / MANIFEST
    if not path.exists():
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name != _STAGING)
        if foreign and not (out / _STAGING).is_dir():
            raise InputError(
                f"{out} is not empty and was not made by tbps-synth (it holds {foreign[0]}): choose another --out."
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["made_by"] == _MADE_BY and {"settings", "layouts", "version"} <= set(manifest):
            return manifest
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path} was not written by tbps-synth: choose another --out.")


def _summary(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield an empty folder inside `out`; it is removed at the end, whatever happens."""
    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _tasks(
    world: World, layouts: Sequence[Layout], staging: Path
) -> tuple[list[_Task], dict[str, list[tuple[str, tuple[str, str, int]]]]]:
    """Return one task per different picture, and for each layout (path, picture key) of its images."""
    tasks: dict[tuple[str, str, int], tuple[Picture, list[str], list[Mask]]] = {}
    owners: dict[str, list[tuple[str, tuple[str, str, int]]]] = {}
    folders: set[Path] = set()
    for layout in layouts:
        placed = layout.place(world)
        owners[layout.name] = [(place.path, place.picture.key) for place in placed]
        for place in placed:
            _, images, masks = tasks.setdefault(place.picture.key, (place.picture, [], []))
            images.append(str(staging / place.path))
            folders.add((staging / place.path).parent)
            if place.mask is not None:
                masks.append(Mask(str(staging / place.mask.path), place.mask.values))
    for folder in sorted(folders):
        folder.mkdir(parents=True, exist_ok=True)
    return [_Task(picture, tuple(images), tuple(masks)) for picture, images, masks in tasks.values()], owners


def _drawn(tasks: list[_Task], settings: Settings, workers: int) -> Iterator[list[_Done]]:
    """Draw all pictures, in this process or in several, and yield what was done in the order of the tasks."""
    batches = [tasks[start : start + _PICTURES_PER_TASK] for start in range(0, len(tasks), _PICTURES_PER_TASK)]
    workers = min(workers, len(tasks) // _PICTURES_PER_WORKER)
    if workers <= 1:
        for batch in batches:
            yield _draw_batch(batch, settings)
        return
    # Spawned, not forked: the caller may have started threads (torch does), which a fork does not survive.
    # An interrupt is the caller's to handle: the workers only finish what they are at.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        yield from pool.map(_draw_batch, batches, [settings] * len(batches))


def _draw_batch(tasks: list[_Task], settings: Settings) -> list[_Done]:
    done = []
    for task in tasks:
        drawing = draw_picture(task.picture, settings)
        _write_image(drawing.picture, task.images, settings.image_format)
        for mask in task.masks:
            np.save(mask.path, np.array(mask.values, dtype=np.uint8)[drawing.parts])
        digest = hashlib.sha256(drawing.picture.tobytes()).hexdigest()
        done.append(_Done(task.picture.key, drawing.seen, digest))
    return done


def _write_image(picture: np.ndarray, paths: Sequence[str], image_format: str) -> None:
    """Write a picture once; its other places are hard links, or copies where the file system has none."""
    options: dict[str, Any] = {"compress_level": 4} if image_format == "png" else {"quality": 95}
    Image.fromarray(picture).save(paths[0], **options)
    for path in paths[1:]:
        try:
            os.link(paths[0], path)
        except OSError:
            shutil.copyfile(paths[0], path)


def _annotate(
    world: World,
    layout: Layout,
    seen: SeenPictures,
    owned: list[tuple[str, tuple[str, str, int]]],
    digests: dict[tuple[str, str, int], str],
    staging: Path,
) -> dict[str, Any]:
    """Write the annotation files and links of a layout and return its entry in the manifest."""
    files = layout.annotate(world, seen)
    annotations = hashlib.sha256()
    for path, text in sorted(files.items()):
        target = staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
        annotations.update(f"{path}\n{text}\n".encode())
    for link, target in layout.links:
        _link_folder(staging / link, staging / target)
    pixels = hashlib.sha256()
    for path, key in sorted(owned):
        pixels.update(f"{path} {digests[key]}\n".encode())
    return {
        "images": len(owned),
        "files": len(files),
        "pixels_sha256": pixels.hexdigest(),
        "annotations_sha256": annotations.hexdigest(),
    }


def _link_folder(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(os.path.relpath(target, link.parent), link, target_is_directory=True)
    except OSError:
        shutil.copytree(target, link)


def _install(staging: Path, out: Path, layouts: Sequence[Layout], earlier: Sequence[Layout]) -> None:
    """Move the finished folders to their places; folders of an earlier world go away, other people's files stay."""
    (out / MANIFEST).unlink(missing_ok=True)
    for folder in {folder for layout in (*earlier, *layouts) for folder in layout.folders}:
        _remove(out / folder)
    for layout in layouts:
        for folder in layout.folders:
            (out / folder).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / folder, out / folder)
    os.replace(staging / LEXICON, out / LEXICON)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
