"""What the export costs in accuracy: the test split of a run by torch, by onnxruntime, and by its 8-bit files.

python packages/cmlfa/benchmarks/bench_export.py --checkpoint my_model --onnx onnx --root_dir data

MODEL is a folder in the layout of the hub, ONNX what `tbps-model export my_model --onnx --int8 --out onnx` wrote. Prints R@1 and
mAP of the features of each, and the time of encoding as a ratio to torch's, in one run on the CPU.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable
from torch import nn

from cmlfa import CMLFA
from cmlfa.config import load_train_configs
from cmlfa.datasets import build_dataloader
from cmlfa.datasets.annotations import read_annotations
from cmlfa.metrics import Evaluator
from cmlfa.options import Options
from tbps_common.models.export import open_encoder


class Exported(nn.Module):
    """Exported encoders in the place of the model."""

    def __init__(self, folder: Path, ending: str):
        super().__init__()
        self.anywhere = nn.Parameter(torch.zeros(()))  # an evaluation asks where the model is
        self.encode_image = open_encoder(folder / f"image{ending}")
        self.encode_text = open_encoder(folder / f"text{ending}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder in the layout of the hub")
    parser.add_argument("--onnx", required=True, help="folder of tbps-model export --int8")
    parser.add_argument("--root_dir", required=True, help="folder that holds the data set's folder")
    parser.add_argument("--batch_size", type=int, default=64)
    flags = parser.parse_args(argv)
    stored = load_train_configs(Path(flags.checkpoint) / "config.json")
    given = {"root_dir": flags.root_dir, "test_batch_size": flags.batch_size, "num_workers": 0, "training": False}
    options = Options.of({**stored, **given})
    images, texts, _ = build_dataloader(options, read_annotations(options, "test"))
    folder = Path(flags.onnx)
    models: dict[str, Any] = {
        "torch": CMLFA.from_pretrained(flags.checkpoint).float(),
        "onnx": Exported(folder, ".onnx"),
        "onnx, int8": Exported(folder, ".int8.onnx"),
    }
    table = PrettyTable(["encoders", "R@1", "mAP", "queries lost at R@1", "time / torch's"], align="r")
    evaluator, first = Evaluator(list(images), list(texts)), (0.0, 0.0)  # every model gets the same batches from memory
    for name, model in models.items():
        started = time.perf_counter()
        result = evaluator.retrieve(model)["t2i"]
        seconds = time.perf_counter() - started
        first = first if name != "torch" else (seconds, result.metrics["R1"])
        lost = round((first[1] - result.metrics["R1"]) / 100 * result.num_queries)
        row = [f"{result.metrics['R1']:.3f}", f"{result.metrics['mAP']:.3f}", lost, f"{seconds / first[0]:.2f}"]
        table.add_row([name, *row])
    print(
        f"{options.dataset_name}, {sum(len(ids) for ids, _ in evaluator.txt_loader)} captions, batches of {flags.batch_size}\n{table}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
