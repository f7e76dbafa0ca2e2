"""`python packages/cmlfa/benchmarks/bench_cmlfa_loading.py`: loading CMLFA's training pairs, beside the direct form.

The direct form takes torchvision's first transforms, and open_clip's tokenizer for every caption.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import Compose, Normalize, RandomErasing, RandomHorizontalFlip, Resize, ToTensor
from torchvision.transforms import Pad as Border
from torchvision.transforms import RandomCrop as Crop

from cmlfa.datasets import build_transforms
from cmlfa.datasets.items import ImageTextMLMDataset
from cmlfa.datasets.tokenizer import mask_tokens
from cmlfa.datasets.transforms import MEAN, PADDING, STD
from tbps_common.bench.loading import compare_loading
from tbps_common.run.command import command

SIZE = (384, 128)


def build(paths: Sequence[str], captions: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """One caption for every picture."""
    erase = RandomErasing(scale=(0.02, 0.4), value=list(MEAN))  # pyright: ignore[reportArgumentType]
    steps = [
        Resize(SIZE),
        RandomHorizontalFlip(0.5),
        Border(PADDING),
        Crop(SIZE),
        ToTensor(),
        Normalize(MEAN, STD),
        erase,
    ]
    transform, tokenizer = Compose(steps), SimpleTokenizer()
    pairs = [(number, number, *pair) for number, pair in enumerate(zip(paths, captions))]
    data = ImageTextMLMDataset(pairs, build_transforms(SIZE, aug=True))

    def direct() -> Any:
        items = []
        for number, _, path, caption in pairs:
            with Image.open(path) as opened:
                image = transform(opened.convert("RGB"))
            ids = [tokenizer.sot_token_id, *tokenizer.encode(caption)[:75], tokenizer.eot_token_id]
            text = torch.zeros(77, dtype=torch.long)
            text[: len(ids)] = torch.tensor(ids)
            masked, labels = mask_tokens(text)
            items.append(
                {"pids": number, "images": image, "caption_ids": text, "mlm_ids": masked, "mlm_labels": labels}
            )
        return default_collate(items)

    return {"direct": direct, "ours": lambda: default_collate([data[number] for number in range(len(data))])}


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a line."""
    return compare_loading(argv, __doc__ or "", (160, 400), build)


if __name__ == "__main__":
    sys.exit(main())
