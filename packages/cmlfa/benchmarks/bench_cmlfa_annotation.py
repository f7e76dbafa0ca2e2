"""`python packages/cmlfa/benchmarks/bench_cmlfa_annotation.py`: from CUHK-PEDES' annotation to training items, beside the direct form.

The direct form makes the training tuples from what `json.load` returns, and tokenises a caption when it is loaded.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmlfa.datasets import CUHKPEDES, ImageTextMLMDataset, TextDataset
from cmlfa.datasets import items as items_module
from tbps_common.run.command import command
from tbps_world.bench.annotation import compare_readers, write_cuhk

items_module.read_image = lambda path: None  # items without their image; `None` is what the transform would give


def direct(folder: Path) -> Sequence[Any]:
    """Tuples of person, image number, path and caption."""
    records = json.loads((folder / "CUHK-PEDES/reid_raw.json").read_bytes())
    training = [record for record in records if record["split"] == "train"]
    return [
        (record["id"] - 1, number, str(folder / "CUHK-PEDES/imgs" / record["file_path"]), caption)
        for number, record in enumerate(training)
        for caption in record["captions"]
    ]


def ours(folder: Path) -> Sequence[Any]:
    """The training set, with the captions of the validation split beside it."""
    data = CUHKPEDES(folder, verbose=False)
    items: Any = ImageTextMLMDataset(data.train)
    items.validation = TextDataset(data.val["caption_pids"], data.val["captions"])
    return items


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    return compare_readers(argv, __doc__ or "", 68_126, write_cuhk, {"direct": direct, "ours": ours})


if __name__ == "__main__":
    sys.exit(main())
