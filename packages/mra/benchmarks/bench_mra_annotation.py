"""`python packages/mra/benchmarks/bench_mra_annotation.py`: reading SDA's annotation, beside the direct form.

The direct form keeps what `json.load` returns, and numbers images and phrases in the records.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mra.data import PretrainDataset
from tbps_common.datasets.sda import SHARDS
from tbps_common.run.command import command
from tbps_world.bench.annotation import compare_readers, write_sda

CONFIG: dict[str, Any] = {"h": 224, "w": 224, "patch_size": 32, "max_words": 56}


def direct(folder: Path) -> Sequence[Any]:
    """Records as stored, with `label` and `phrase_labels`."""
    records = [record for name in SHARDS for record in json.loads((folder / "data/sda" / name).read_bytes())]
    labels: dict[Any, int] = {}
    for record in records:
        record["label"] = labels.setdefault(record["image_id"], len(labels))
        record["image"] = str(folder / "images/SDA") + "/" + record["image"]
    phrases: dict[str, int] = {}
    for record in records:
        record["phrase_labels"] = [
            phrases.setdefault(phrase, len(labels) + len(phrases)) for phrase in record["phrases"]
        ]
    return records


def ours(folder: Path) -> Sequence[Any]:
    """The records of `mra.PretrainDataset`."""
    files = [str(folder / "data/sda" / name) for name in SHARDS]
    return PretrainDataset({**CONFIG, "train_file_regions": files, "image_root": str(folder / "images/SDA")}).records


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    return compare_readers(argv, __doc__ or "", 1_217_750, write_sda, {"direct": direct, "ours": ours})


if __name__ == "__main__":
    sys.exit(main())
