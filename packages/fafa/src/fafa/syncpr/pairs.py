"""`fafa-syncpr pairs`: training pictures for the LoRA, two views of one person side by side with the prompt of `images`."""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from fafa.syncpr.images import check_template
from fafa.syncpr.prompts import image_prompt
from tbps_common.datasets import load_syncpr
from tbps_common.errors import DatasetError
from tbps_common.files import atomic_path, write_text
from tbps_common.images import read_image
from tbps_common.run.progress import progress_bar

CAPTIONS = "captions.jsonl"


def main(flags: argparse.Namespace) -> int:
    """Write the pairs; returns the exit status.

    Raises:
        DatasetError: a triplet or picture cannot be used.
    """
    check_template(flags.prompt_template)
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
    lines = []
    with progress_bar(len(chosen), unit="pair") as progress:
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


def side_by_side(halves: list[Image.Image], height: int, width: int) -> Image.Image:
    """One picture of `height` x `width`, each half resized to its place."""
    whole = Image.new("RGB", (width, height))
    for place, half in enumerate(halves):
        whole.paste(half.resize((width // 2, height), Image.Resampling.BICUBIC), (place * (width // 2), 0))
    return whole
