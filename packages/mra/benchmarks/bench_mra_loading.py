"""`python packages/mra/benchmarks/bench_mra_loading.py`: loading MRA's pairs for fine-tuning, beside the direct form.

The direct form tokenises the captions of a batch in the process that trains, as the released code does.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomHorizontalFlip, Resize, ToTensor

from mra.data.datasets import FinetuneDataset
from mra.data.loader import TrainingItems
from mra.data.transforms import MEAN, STD, RandomErasing
from mra.text.augmentation import pre_caption
from mra.text.tokens import TextMaskingGenerator, build_tokenizer, mlm_batch
from tbps_common.bench.annotation import vocabulary
from tbps_common.bench.loading import compare_loading
from tbps_common.datasets import ProcessedTrain
from tbps_common.run.command import command

SIZE = (384, 128)
CONFIG: dict[str, Any] = {
    **{"h": SIZE[0], "w": SIZE[1], "erasing_p": 0.6, "max_words": 50, "max_tokens": 50},
    **{"max_masks": 12, "mask_prob": 0.25, "skipgram_prb": 0.2, "skipgram_size": 3},
}


def build(paths: Sequence[str], captions: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """One caption for every picture."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary(3000)]
        Path(folder, "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        tokenizer = build_tokenizer(folder)
    resize = Resize(SIZE, InterpolationMode.BICUBIC)
    steps = [resize, RandomHorizontalFlip(0.5), ToTensor(), Normalize(MEAN, STD), RandomErasing(CONFIG["erasing_p"])]
    transform, masking = Compose(steps), TextMaskingGenerator(tokenizer, 0.25, 12)
    annotation = ProcessedTrain([*paths], [*captions], [*range(len(paths))], len(paths))
    data = TrainingItems(FinetuneDataset(CONFIG, data=annotation), tokenizer, CONFIG)

    def direct() -> Any:
        items = []
        for number, path in enumerate(paths):
            with Image.open(path) as opened:
                items.append((transform(opened.convert("RGB")), pre_caption(captions[number], 50), number))
        images, texts, numbers = default_collate(items)
        text = tokenizer(texts, padding="max_length", truncation=True, max_length=50, return_tensors="pt")
        return images, numbers, text, mlm_batch(text["input_ids"], masking, 12)

    return {"direct": direct, "ours": lambda: data.collate([data[number] for number in range(len(data))])}


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a line."""
    return compare_loading(argv, __doc__ or "", (160, 400), build)


if __name__ == "__main__":
    sys.exit(main())
