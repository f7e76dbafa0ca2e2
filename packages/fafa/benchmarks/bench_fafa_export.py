"""What the export costs in accuracy: ITCPR by torch, by onnxruntime, and by its 8-bit files, in one run on the CPU.

tbps-model export MODEL --onnx --int8 --out ONNX     # MODEL is a folder in the layout of the hub
python packages/fafa/benchmarks/bench_fafa_export.py --checkpoint MODEL --onnx ONNX --itcpr-root data/ITCPR
"""

import argparse
import sys
from pathlib import Path
from typing import cast

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from fafa.convert import encoders
from fafa.evaluation import itcpr_sets
from fafa.model.fafa import Blip2FAFACPR
from fafa.processors import BlipCaptionProcessor
from fafa.run_directory import read_run
from fafa.transforms import build_transforms
from tbps_common.datasets import ITCPR
from tbps_world.bench.encoders import compare_encoders


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder in the layout of the hub")
    parser.add_argument("--onnx", required=True, help="folder of tbps-model export --int8")
    parser.add_argument("--itcpr-root", required=True, help="ITCPR root")
    parser.add_argument("--batch-size", type=int, default=64)
    flags = parser.parse_args(argv)
    run = read_run(argparse.Namespace(exp_dir=flags.checkpoint, model_name="", backbone=None))
    models = encoders(Path(flags.checkpoint))
    model = cast(Blip2FAFACPR, models[0].model)
    transforms = build_transforms(
        run.hyperparameters.transform, model.settings.image_size, run.hyperparameters.target_ratio
    )
    queries, gallery = itcpr_sets(ITCPR(flags.itcpr_root, verbose=False), transforms.test)
    clean = BlipCaptionProcessor()

    def words(captions: list[str]) -> tuple[Tensor, Tensor]:
        encoded = model.tokenize([clean(caption) for caption in captions])
        room = model.max_txt_len - encoded["input_ids"].shape[1]
        return pad(encoded["input_ids"], (0, room)), pad(encoded["attention_mask"], (0, room))

    pictures = [(images,) for _, images in DataLoader(gallery, flags.batch_size)]
    asked = [(images, *words(captions)) for _, images, captions in DataLoader(queries, flags.batch_size)]
    people = gallery.instance_ids, queries.instance_ids
    k = run.hyperparameters.fda_k
    print(compare_encoders(models, Path(flags.onnx), [pictures, asked], *people, reduce="topk_mean", k=k))
    return 0


if __name__ == "__main__":
    sys.exit(main())
