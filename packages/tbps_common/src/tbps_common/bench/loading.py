"""What loading a training item costs, from its JPEG file to the batch: CPU milliseconds on one core, two ways in one run.

`benchmarks/bench_<name>_loading.py` of each package hands `compare_loading` this package's data set and the direct form:
torchvision's first transforms one after the other, and the tokenizer as its library gives it.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tbps_common.bench.annotation import vocabulary
from tbps_common.bench.timer import measure
from tbps_common.files import write_json
from tbps_common.run.arguments import whole_number

PICTURES = 64

Collated = Callable[[], Any]


def compare_loading(
    argv: list[str],
    description: str,
    size: tuple[int, int],
    build: Callable[[Sequence[str], Sequence[str]], dict[str, Collated]],
) -> int:
    """Parse the flags, draw pictures, measure both forms in turns, print a table; returns the exit status.

    Args:
        argv: the command line.
        description: of the command.
        size: width and height of the pictures.
        build: paths of pictures and as many captions -> `direct` and `ours`, each of which loads one batch of them all.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--repeats", type=whole_number(1), default=7, help="timed batches of each form (7); the best counts"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    words = vocabulary(3000)
    captions = [" ".join(words[(37 * item + 11 * word) % 3000] for word in range(25)) for item in range(PICTURES)]
    with tempfile.TemporaryDirectory(prefix="tbps-loading-") as folder:
        paths = [str(Path(folder, f"{number}.jpg")) for number in range(PICTURES)]
        for path in paths:
            # Noise of a few pixels' size: a JPEG file of about the length that a photograph of a person has.
            coarse = [Image.effect_noise((size[0] // 4, size[1] // 4), 60) for _ in range(3)]
            Image.merge("RGB", coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        costs = measure(build(paths, captions), repeats=args.repeats)
    each = {name: cost.milliseconds / PICTURES for name, cost in costs.items()}
    print(f"an item of a batch, CPU ms: direct {each['direct']:.2f}, ours {each['ours']:.2f}, ", end="")
    print(
        f"ratio {each['direct'] / each['ours']:.2f} ({size[0]} x {size[1]} pixels, one thread, torch {torch.__version__})"
    )
    if args.json:
        write_json(args.json, {"size": size, "torch": torch.__version__, "milliseconds": each})
    return 0
