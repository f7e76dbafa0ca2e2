"""`python packages/diana/benchmarks/bench_diana_annotation.py`: reading MALS' annotation, beside the direct form.

The direct form keeps image, caption and label of what `json.load` returns, each in a list.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diana.data.training import build_training_dataset
from tbps_common.datasets.mals import SHARDS
from tbps_common.run.command import command
from tbps_world.bench.annotation import compare_readers, write_mals
from tbps_world.tiny.diana import tiny_tokenizer


class Samples(Sequence[Any]):
    """Path, label and text of every sample."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], texts: Sequence[Any]) -> None:
        self.columns = paths, labels, texts

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        return [column[index] for column in self.columns]


def direct(folder: Path) -> Sequence[Any]:
    """Three lists."""
    records = [record for name in SHARDS for record in json.loads((folder / "MALS/gene_attrs" / name).read_bytes())]
    labels: dict[Any, int] = {}
    return Samples(
        [str(folder / "MALS") + "/" + record["image"] for record in records],
        [labels.setdefault(record["image_id"], len(labels)) for record in records],
        [record["caption"] for record in records],
    )


def ours(folder: Path) -> Sequence[Any]:
    """The samples of `diana.data.training.TrainingDataset`."""
    meta = {
        "image_root": str(folder / "MALS"),
        "train_annotation": [str(folder / "MALS/gene_attrs" / name) for name in SHARDS],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    tokenizer = tiny_tokenizer(["a", "man"], 300)
    data = build_training_dataset(meta, tokenizer, dataset_name="mals", image_size=(384, 192), max_seq_length=56)
    return Samples(data.paths, data.labels, data.texts)


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    return compare_readers(argv, __doc__ or "", 1_510_330, write_mals, {"direct": direct, "ours": ours})


if __name__ == "__main__":
    sys.exit(main())
