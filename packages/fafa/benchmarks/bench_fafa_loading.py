"""`python packages/fafa/benchmarks/bench_fafa_loading.py`: loading SynCPR's training pictures, beside the direct form.

The direct form pads, crops and pads in three steps, and makes normalised floats in the loader's process.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Pad,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
)
from torchvision.transforms import RandomCrop as AnyRandomCrop

from fafa.data import SynCPRDataset, collate_fn
from fafa.transforms import MEAN, PERSON_SIZE, STD, SquarePad, squarepad_transform_train
from tbps_common.bench.loading import compare_loading
from tbps_common.datasets import SynCPRRecord
from tbps_common.run.command import command

SIDE = 224


def build(paths: Sequence[str], captions: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Triplets of every picture with the one after it."""
    transform = Compose(
        [
            RandomHorizontalFlip(0.5),
            Pad(10),
            AnyRandomCrop(PERSON_SIZE),
            SquarePad(),
            Resize(SIDE, InterpolationMode.BICUBIC),
            CenterCrop(SIDE),
            lambda image: image.convert("RGB"),
            ToTensor(),
            Normalize(MEAN, STD),
        ]
    )
    pairs = [*zip(paths[::2], paths[1::2], captions)]
    records = [SynCPRRecord(*pair, number, None, None) for number, pair in enumerate(pairs)]
    data = SynCPRDataset("", preprocess=squarepad_transform_train(SIDE).pixels, records=records)

    def direct() -> Any:
        items = []
        for number, (reference, target, caption) in enumerate(pairs):
            with Image.open(reference) as one, Image.open(target) as other:
                items.append((transform(one), transform(other), caption, number))
        return default_collate(items)

    return {"direct": direct, "ours": lambda: collate_fn([data[number] for number in range(len(data))])}


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a line."""
    return compare_loading(argv, __doc__ or "", (PERSON_SIZE[1], PERSON_SIZE[0]), build)


if __name__ == "__main__":
    sys.exit(main())
