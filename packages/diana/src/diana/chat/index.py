"""`diana-index`: compute the features of images once, so that a conversation only has to encode its text."""

import argparse
from pathlib import Path

from diana.chat.gallery import (
    Gallery,
    checkpoint_mark,
    join,
    read_gallery,
    read_header,
    require_checkpoint,
    write_gallery,
)
from tbps_common.arguments import HelpFormatter, number, whole_number
from tbps_common.errors import GalleryError, InputError

DESCRIPTION = """\
Compute the features of all images of a folder once, for diana-chat:

  diana-index --pretrained work_dirs/finetune --images my_pictures --out gallery.safetensors

An index that exists already is completed with the images it lacks. Images that cannot be read are left out, each with a
warning.
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
    if out.exists():
        header = read_header(out)
        require_checkpoint(out, header, folder)
        known = set(header["paths"])
    missing = [image for image in images if image not in known]
    if not missing:
        print(f"{out}: all {len(images)} images are there already")
        return 0
    earlier = read_gallery(out) if known else None
    if earlier is not None and (earlier.attributes is not None) != (flags.mode == "all"):
        raise GalleryError(f"{out} was made with another --mode: use the same, or write to another --out")
    gallery = _encode(flags, folder, missing, earlier)
    write_gallery(out, gallery)
    added = len(gallery.paths) - len(known)
    print(f"{out}: {added} images added, {len(gallery.paths)} in all")
    return 0


def listed_images(source: str) -> list[str]:
    """Image paths of a folder, searched with its sub-folders, or of a text file with one path a line.

    Raises:
        InputError: nothing is there.
    """
    from tbps_common.gallery import find_images

    file = Path(source)
    if not file.is_file():
        return find_images(source)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {file} is neither a folder nor a list of paths ({error})") from error
    paths = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not paths:
        raise InputError(f"--images {file} lists no image: write one path a line")
    return paths


def _encode(flags: argparse.Namespace, folder: Path, images: list[str], earlier: Gallery | None) -> Gallery:
    import torch

    from diana.data import build_eval_transform
    from diana.model import load_diana
    from diana.retrieval import encode_images
    from tbps_common.device import choose_device

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
    paths, embeds, attributes = join(batches)
    if earlier is not None:
        paths, embeds = [*earlier.paths, *paths], torch.cat([earlier.embeds, embeds])
        if attributes is not None and earlier.attributes is not None:
            attributes = torch.cat([earlier.attributes, attributes])
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
