"""`fafa-syncpr pairs`: training pictures for the LoRA, two views of one person side by side with the prompt of `images`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fafa.syncpr.images import check_template
from fafa.syncpr.prompts import IMAGE_TEMPLATE, image_prompt
from tbps_common.errors import DatasetError
from tbps_common.files import atomic_path, write_text
from tbps_common.run.arguments import whole_number

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Put two pictures of one person side by side, with the prompt that `fafa-syncpr images` would use:

  fafa-syncpr pairs --out pairs --syncpr data/SynCPR          (triplets with captions, in SynCPR's layout)
  fafa-syncpr lora --out lora --data pairs --model black-forest-labs/FLUX.1-dev

Writes pairs/images/<number>.png and pairs/captions.jsonl. Any folder with such a file trains a LoRA; one line of it is
{"image": "images/0.png", "caption": "A side-by-side pair of ..."}.
"""

CAPTIONS = "captions.jsonl"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command, beside `--out`."""
    parser.add_argument("--syncpr", required=True, metavar="ROOT", help="folder with pictures and an annotation")
    parser.add_argument("--json-path", default="SynCPR.json", help="annotation, relative to --syncpr or absolute")
    parser.add_argument("--height", type=whole_number(16), default=384, help="of the whole picture")
    parser.add_argument("--width", type=whole_number(16), default=384, help="of the whole picture")
    parser.add_argument("--limit", type=whole_number(1), help="pairs, at most")
    parser.add_argument("--prompt-template", metavar="TEXT", default=IMAGE_TEMPLATE, help="as for fafa-syncpr images")


def run(flags: argparse.Namespace) -> int:
    """Write the pairs; returns the exit status."""
    check_template(flags.prompt_template)
    from tbps_common.datasets import load_syncpr

    # A pair and its reverse are one pair here.
    pairs: dict[frozenset[str], Any] = {}
    for record in load_syncpr(flags.syncpr, flags.json_path):
        pairs.setdefault(frozenset((record.reference_image_path, record.target_image_path)), record)
    chosen = list(pairs.values())[: flags.limit]
    for number, record in enumerate(chosen):
        if not (record.reference_caption and record.target_caption):
            raise DatasetError(
                f"{flags.syncpr}: triplet {number} has no reference_caption and target_caption, which make the prompt"
            )
    from tbps_common.images import read_image
    from tbps_common.run.progress import Progress

    lines = []
    with Progress(len(chosen), unit="pair") as progress:
        for number, record in enumerate(chosen):
            halves = [read_image(path) for path in (record.reference_image_path, record.target_image_path)]
            name = f"images/{number}.png"
            with atomic_path(Path(flags.out) / name, one_writer=True) as temporary:
                side_by_side(halves, flags.height, flags.width).save(temporary, format="PNG")
            caption = image_prompt(flags.prompt_template, record.reference_caption, record.target_caption)
            lines.append(json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n")
            progress.update()
    write_text(Path(flags.out) / CAPTIONS, "".join(lines))
    print(f"{Path(flags.out) / CAPTIONS}: {len(lines)} pairs")
    return 0


def side_by_side(halves: "list[Image.Image]", height: int, width: int) -> "Image.Image":
    """One picture of `height` x `width`, each half resized to its place."""
    from PIL import Image

    whole = Image.new("RGB", (width, height))
    for place, half in enumerate(halves):
        whole.paste(half.resize((width // 2, height), Image.Resampling.BICUBIC), (place * (width // 2), 0))
    return whole
