"""`mra-dad finetune`: from flags to a trained adapter; see `mra.dad.alignment` for the run itself."""

import argparse
import os
from pathlib import Path

from mra.dad.options import LEARNING_RATES
from mra.dad.work import require_extra, require_model
from tbps_common.datasets import load_processed_train
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import check_images_exist

MANIFEST_NAME, STATE_NAME, LOG_NAME = "manifest.json", "last.pth", "log.jsonl"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: flags, pairs or the model cannot be used.
    """
    require_extra("diffusers", "accelerate", *(("peft",) if args.method == "lora" else ()))
    require_model("--model", args.model)
    if args.lr is None:
        args.lr = LEARNING_RATES[args.method]
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    data = load_processed_train(args.train_file, args.image_root)
    if not data.captions:
        raise DatasetError(f"--train_file {args.train_file} holds no pair: give the training pairs")
    check_images_exist(data.image_paths, args.image_root, flag="--image_root")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked

    from mra.dad.alignment import Alignment
    from tbps_common.run.device import choose_device
    from tbps_common.run.distributed import Ranks, process_group
    from tbps_common.run.logs import run_log
    from tbps_common.run.stop import Interruption

    device = choose_device(args.device, Ranks.from_environment().local_rank)
    with (
        Interruption() as interruption,
        run_log("mra.dad", enabled=Ranks.from_environment().is_main) as log,
        process_group(device) as ranks,
    ):
        return Alignment(args, data, device, ranks, interruption, log).train()
