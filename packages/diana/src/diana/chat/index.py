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
from tbps_common.errors import GalleryError, InputError
from tbps_common.run.arguments import HelpFormatter, number, whole_number

DESCRIPTION = """\
Compute the features of all images of a folder once, for diana-chat:

  diana-index --pretrained work_dirs/finetune --images my_pictures --out gallery.safetensors

An index that exists already is brought up to date: images it lacks are added, images that changed since are encoded
again, and those whose file is gone are dropped. Images that cannot be read are left out, each with a warning.
"""
# Of ChatPedes, which the fine-tuned model was trained with.
MEAN = (0.38901278, 0.3651612, 0.34836376)
STD = (0.24344306, 0.23738699, 0.23368555)


def main(argv: list[str]) -> int:
    """Parse, look at what is there, encode what is missing, write."""
    flags = _parse(argv)
    from diana.model.config import DiaNAConfig
    from diana.model.folders import resolve_folder

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
    """Absolute image paths of a folder, searched with its sub-folders, or of a text file with one path a line.

    Absolute, because a chat may be held in another folder, and one picture named in two ways would be found twice.

    Raises:
        InputError: nothing is there.
    """
    from tbps_common.search.gallery import find_images

    file = Path(source)
    if not file.is_file():
        return [os.path.abspath(path) for path in find_images(source)]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {file} is neither a folder nor a list of paths ({error})") from error
    paths = list(dict.fromkeys(os.path.abspath(line.strip()) for line in lines if line.strip()))
    if not paths:
        raise InputError(f"--images {file} lists no image: write one path a line")
    return paths


def _encode(flags: argparse.Namespace, folder: Path, images: list[str], earlier: Gallery | None) -> Gallery:
    import torch

    from diana.data import build_eval_transform
    from diana.model import load_diana
    from diana.retrieval import encode_images
    from tbps_common.run.device import choose_device

    dtype = {"checkpoint": None, "fp32": torch.float32, "bf16": torch.bfloat16}[flags.dtype]
    model, _ = load_diana(folder, device=choose_device(flags.device), dtype=dtype)
    size = model.config.image_size
    batches = encode_images(
        model,
        images,
        build_eval_transform(size, flags.mean, flags.std),
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        attributes=flags.mode == "all",
        skip_unreadable=True,
        progress=True,
    )
    paths, embeds, attributes = join(batches, earlier)
    return Gallery(paths, embeds, attributes, size, checkpoint_mark(folder))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diana-index", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="DIR", help="checkpoint folder")
    add("--images", required=True, help="folder of images, or a text file with one path a line")
    add("--out", default="gallery.safetensors", metavar="FILE", help="index to write or to complete")
    add("--mode", choices=("global", "all"), default="global", help="all: with attributes, for better ranking")
    add("--batch_size", type=whole_number(1), default=128, help="images encoded at once")
    add("--num_workers", type=whole_number(0), default=0, help="processes that read images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--dtype", choices=("checkpoint", "fp32", "bf16"), default="checkpoint", help="of the model")
    add("--mean", type=number(), nargs=3, default=list(MEAN), help="of the training images, red green blue")
    add("--std", type=number(0, above=True), nargs=3, default=list(STD), help="likewise")
    return parser.parse_args(argv)
