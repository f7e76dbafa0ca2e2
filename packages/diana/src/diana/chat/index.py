"""`diana-index`: compute the features of images once, so that a conversation only has to encode its text."""

import argparse
import os
from pathlib import Path

from diana.chat.gallery import (
    Gallery,
    check_paths_fit,
    checkpoint_mark,
    join,
    read_gallery,
    read_header,
    require_checkpoint,
    write_gallery,
)
from diana.data.augmentation import build_eval_transform
from diana.model.config import DiaNAConfig
from diana.model.diana import DTYPES, load_diana
from diana.model.folders import resolve_folder
from diana.retrieval.images import encode_images
from tbps_common.errors import GalleryError, InputError
from tbps_common.run.device import choose_device
from tbps_common.search.old_gallery import find_images


def update_index(flags: argparse.Namespace) -> int:
    """Look at what is there, encode what is missing, write."""
    images = listed_images(flags.images)
    folder = resolve_folder(flags.pretrained)
    config = DiaNAConfig.from_file(folder / "config.json")
    if flags.mode == "all" and not config.enable_refiner:
        raise InputError(f"--mode all needs the attribute refiner, which {folder} does not have: use --mode global")
    out = Path(flags.out)
    known: set[str] = set()
    outdated: set[str] = set()
    if out.exists():
        header = read_header(out)
        require_checkpoint(out, header, folder)
        known = set(header["paths"])
        outdated = _outdated(known, out.stat().st_mtime)
    missing = [image for image in images if image not in known or image in outdated]
    if not missing and not outdated:
        print(f"{out}: all {len(images)} images are there already")
        return 0
    check_paths_fit(known.union(missing))
    earlier = read_gallery(out) if known else None
    if earlier is not None and (earlier.attributes is not None) != (flags.mode == "all"):
        raise GalleryError(f"{out} was made with another --mode: use the same, or write to another --out")
    earlier = None if earlier is None else earlier.without(outdated)
    gallery = earlier if earlier is not None and not missing else _encode(flags, folder, missing, earlier)
    kept = 0 if earlier is None else len(earlier.paths)
    added = len(gallery.paths) - kept
    if added or outdated:
        write_gallery(out, gallery)
    dropped = f", {len(outdated)} that changed or are gone dropped" if outdated else ""
    print(f"{out}: {added} images added{dropped}, {len(gallery.paths)} in all")
    return 0


def _outdated(paths: set[str], indexed_at: float) -> set[str]:
    """Images that are gone, or were written after the index."""

    def is_outdated(path: str) -> bool:
        try:
            return os.stat(path).st_mtime > indexed_at
        except (OSError, ValueError):
            return True

    return {path for path in paths if is_outdated(path)}


def listed_images(source: str) -> list[str]:
    """Absolute image paths of a folder, searched with its sub-folders, or of a text file with one path per line.

    Absolute, because a chat may be held in another folder, and one picture named in two ways would be found twice.

    Raises:
        InputError: nothing is there.
    """
    file = Path(source)
    if not file.is_file():
        return [os.path.abspath(path) for path in find_images(source)]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {file} is neither a folder nor a list of paths ({error})") from error
    paths = list(dict.fromkeys(os.path.abspath(line.strip()) for line in lines if line.strip()))
    if not paths:
        raise InputError(f"--images {file} lists no images: write one path per line")
    return paths


def _encode(flags: argparse.Namespace, folder: Path, images: list[str], earlier: Gallery | None) -> Gallery:
    model, _ = load_diana(folder, device=choose_device(flags.device), dtype=DTYPES[flags.dtype])
    size = model.config.image_size
    batches = encode_images(
        model,
        images,
        build_eval_transform(size, flags.mean, flags.std),
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        attributes=flags.mode == "all",
        skip_unreadable=True,
        as_shown=True,
        progress=True,
    )
    paths, embeds, attributes = join(batches, earlier)
    return Gallery(paths, embeds, attributes, size, checkpoint_mark(folder))
