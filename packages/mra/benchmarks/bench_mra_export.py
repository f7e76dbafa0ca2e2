"""What the export costs in accuracy: a test split by torch, by onnxruntime, and by its 8-bit files, in one run on the CPU.

tbps-model export MODEL --onnx --int8 --out ONNX     # MODEL is a folder in the layout of the hub
python packages/mra/benchmarks/bench_mra_export.py --checkpoint MODEL --onnx ONNX --ann_file data/finetune/cuhk_test.json --image_root images

Compared is the similarity alone: the fusion encoder, which judges the best pictures again, is not exported.
"""

import argparse
import json
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from mra.convert import encoders
from mra.data import RetrievalTestDataset
from mra.text import build_tokenizer, tokenize
from tbps_world.bench.encoders import compare_encoders


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder in the layout of the hub")
    parser.add_argument("--onnx", required=True, help="folder of tbps-model export --int8")
    parser.add_argument("--ann_file", required=True, help="annotation of the test split")
    parser.add_argument("--image_root", required=True, help="folder that its paths are relative to")
    parser.add_argument("--batch_size", type=int, default=64)
    flags = parser.parse_args(argv)
    config = json.loads((Path(flags.checkpoint) / "config.json").read_text(encoding="utf-8"))
    data = RetrievalTestDataset(flags.ann_file, {**config, "image_root": flags.image_root, "test_hflip": False})
    images = [(batch,) for batch, _, _ in DataLoader(data, flags.batch_size)]
    ids, mask = tokenize(build_tokenizer(flags.checkpoint), data.text, config["max_tokens"])
    texts = list(zip(ids.split(flags.batch_size), mask.split(flags.batch_size)))
    models, people = encoders(Path(flags.checkpoint)), (data.g_pids, data.q_pids)
    print(compare_encoders(models, Path(flags.onnx), [images, texts], *people))
    return 0


if __name__ == "__main__":
    sys.exit(main())
