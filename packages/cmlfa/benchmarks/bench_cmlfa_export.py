"""What the export costs in accuracy: the test split by torch, by onnxruntime, and by its 8-bit files, in one run on the CPU.

tbps-model export MODEL --onnx --int8 --out ONNX     # MODEL is a folder in the layout of the hub
python packages/cmlfa/benchmarks/bench_cmlfa_export.py --checkpoint MODEL --onnx ONNX --root_dir data
"""

import argparse
import sys
from pathlib import Path

from cmlfa.config import load_train_configs
from cmlfa.convert import encoders
from cmlfa.datasets import build_dataloader
from cmlfa.datasets.annotations import read_annotations
from cmlfa.options import Options
from tbps_world.bench.encoders import compare_encoders


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
    inputs = [[(batch,) for _, batch in loader] for loader in (images, texts)]
    people = images.dataset.image_pids, texts.dataset.caption_pids
    print(compare_encoders(encoders(Path(flags.checkpoint)), Path(flags.onnx), inputs, *people))
    return 0


if __name__ == "__main__":
    sys.exit(main())
