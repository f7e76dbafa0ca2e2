"""`fafa-syncpr lora`: fine-tune a text-to-image model, so that its wide pictures show one person twice."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fafa.syncpr.libraries import require_extra, require_model_folder
from fafa.syncpr.pairs import CAPTIONS
from tbps_common.errors import DatasetError, InputError
from tbps_common.run.arguments import add_bad_images_flag, number, whole_number

DESCRIPTION = """\
Train a LoRA on the attention of a text-to-image model (Stable Diffusion 1 and 2, Flux) with pictures and captions:

  fafa-syncpr lora --out lora --data pairs --model black-forest-labs/FLUX.1-dev --steps 2000 --batch-size 4
  torchrun --nproc_per_node=4 -m fafa.syncpr lora --out lora ...      (four GPUs, each with a batch of its own)

DATA/captions.jsonl has one line {"image": "images/0.png", "caption": "..."} per picture; `fafa-syncpr pairs` makes such a
folder. Writes lora/pytorch_lora_weights.safetensors, which `fafa-syncpr images --lora` and diffusers load, lora/log.jsonl,
and the state to go on from: after a kill the same command ends with the same weights. --steps may be raised later.
"""

WEIGHTS = "pytorch_lora_weights.safetensors"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command, beside `--out`, `--device` and `--dtype`."""
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with captions.jsonl and its pictures")
    parser.add_argument(
        "--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub name of a diffusers model"
    )
    parser.add_argument("--revision", help="of the hub")
    parser.add_argument("--rank", type=whole_number(1), default=16, help="of the LoRA")
    parser.add_argument("--steps", type=whole_number(1), default=2000, help="optimizer steps of the whole training")
    parser.add_argument("--batch-size", type=whole_number(1), default=4, help="pictures per step and process")
    parser.add_argument("--learning-rate", type=number(0, above=True), default=1e-4, help="of AdamW")
    parser.add_argument("--warmup", type=whole_number(0), default=100, help="steps in which the rate rises")
    parser.add_argument("--height", type=whole_number(16), default=384, help="pictures are resized to it")
    parser.add_argument("--width", type=whole_number(16), default=384, help="pictures are resized to it")
    parser.add_argument(
        "--caption-dropout", type=number(0, 1), default=0.1, help="share of empty captions, for guidance"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--save-every", type=whole_number(1), default=200, help="steps between two savings")
    parser.add_argument("--log-every", type=whole_number(1), default=20, help="steps between two lines of the log")
    parser.add_argument("--num-workers", type=whole_number(0), default=2, help="processes that load pictures")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of order, noise and first weights")
    add_bad_images_flag(parser)


def run(flags: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    if flags.height % 16 or flags.width % 16:
        raise InputError(f"--height {flags.height} and --width {flags.width} must be multiples of 16")
    require_extra("lora", "diffusers", "transformers", "peft")
    require_model_folder(flags.model, "model_index.json", "--model")
    items = read_captions(flags.data)
    from fafa.syncpr.lora_training import train

    status = train(flags, items)
    if status:
        print("stopped; the same command goes on", file=sys.stderr)
    return status


def read_captions(folder: str | Path) -> list[tuple[str, str]]:
    """Paths and captions of the training pictures.

    Raises:
        DatasetError: the file or a line cannot be used, or pictures are missing.
    """
    from tbps_common.images import check_images_exist
    from tbps_common.pipeline.journal import read_json_lines

    path = Path(folder) / CAPTIONS
    items = []
    for line, record in read_json_lines(path):
        if isinstance(record, str):
            raise DatasetError(f"{path}, line {line + 1}: {record}")
        image, caption = record.get("image"), record.get("caption")
        if not isinstance(image, str) or not isinstance(caption, str) or not image:
            raise DatasetError(f'{path}, line {line + 1}, is not of the form {{"image": "...", "caption": "..."}}')
        if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
            raise DatasetError(f"{path}, line {line + 1}: the picture {image!r} is no path inside {folder}")
        items.append((str(Path(folder) / image), caption))
    if not items:
        raise DatasetError(f"{path} holds no pictures")
    check_images_exist((image for image, _ in items), str(folder), flag="--data")
    return items


def settings_of(flags: argparse.Namespace, items: list[tuple[str, str]], processes: int) -> dict[str, Any]:
    """What the weights depend on, for the manifest."""
    import hashlib

    names = "model revision rank batch_size learning_rate warmup height width caption_dropout seed dtype"
    data = hashlib.sha256("\n".join(f"{Path(image).name}\t{caption}" for image, caption in items).encode())
    return {name: getattr(flags, name) for name in names.split()} | {
        "data": data.hexdigest()[:16],
        "processes": processes,
    }
