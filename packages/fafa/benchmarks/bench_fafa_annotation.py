"""`python packages/fafa/benchmarks/bench_fafa_annotation.py`: reading SynCPR's annotation, beside the direct form.

The direct form keeps what `json.load` returns.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fafa.data import SynCPRDataset
from tbps_common.datasets import load_syncpr
from tbps_common.run.command import command
from tbps_world.bench.annotation import compare_readers, write_syncpr


class WithoutImages(SynCPRDataset):
    """Triplets with paths in place of their images."""

    def _load(self, path: str) -> Any:
        return path


def direct(folder: Path) -> Sequence[Any]:
    """Records as stored."""
    return json.loads((folder / "SynCPR/SynCPR.json").read_bytes())


def ours(folder: Path) -> Sequence[Any]:
    """The training set, from the records that the checks before a training have read."""
    records = load_syncpr(folder / "SynCPR")
    return WithoutImages(folder / "SynCPR", records=records)  # type: ignore[return-value]


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    return compare_readers(argv, __doc__ or "", 1_150_000, write_syncpr, {"direct": direct, "ours": ours})


if __name__ == "__main__":
    sys.exit(main())
