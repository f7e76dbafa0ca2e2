"""`--evaluate`: the validation and the test split of a task, with the weights of a checkpoint."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from mra.config import CONFIG_NAME, evaluation_files, with_overrides, write_config
from mra.data import RetrievalTestDataset
from mra.model import Retrieval
from mra.model.official_layout import load_pretrained
from mra.retrieval import EvaluationStopped, evaluate_split, write_reports
from mra.text import build_tokenizer
from tbps_common.run.distributed import Ranks
from tbps_common.run.randomness import seed_everything
from tbps_common.run.stop import AgreedStop, Interruption

logger = logging.getLogger("mra.training")

# What is evaluated: pre-training on SDA is judged by CUHK-PEDES.
NAMES = {"sda": "CUHK-PEDES", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}


def evaluate(
    config: dict[str, Any], args: argparse.Namespace, device: torch.device, ranks: Ranks, interruption: Interruption
) -> int:
    """Print the tables of the splits; writes `config.yaml` and, with `--report`, what `mra.retrieval.write_reports` makes.

    Returns:
        Exit status: 0, or 130 or 143 after an interruption.

    Raises:
        InputError: data, weights or checkpoint cannot be used.
    """
    stop = AgreedStop(interruption, ranks)
    seed_everything(args.seed + ranks.rank)
    settings = with_overrides(config, args)
    tokenizer = build_tokenizer(settings["text_encoder"])
    splits = {name: RetrievalTestDataset(file, settings) for name, file in evaluation_files(settings).items()}
    model = Retrieval(settings, init_backbones=False)
    load_pretrained(model, args.checkpoint, settings, is_eval=True, trust=args.trust_checkpoint)
    model = model.to(device).eval()
    if ranks.is_main:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / CONFIG_NAME, config)
    for name, dataset in splits.items():
        try:
            result = evaluate_split(
                model,
                dataset,
                tokenizer,
                settings,
                device=device,
                ranks=ranks,
                score_world=args.score_world,
                num_workers=args.num_workers,
                amp=args.amp_eval,
                stop=stop,
            )
        except EvaluationStopped:
            return interruption.exit_status
        if ranks.is_main:
            print(f"### {name}_result:\n{result.itm.table()}", flush=True)
            if args.report:
                files = write_reports(
                    args.output_dir, result, dataset, name=NAMES[args.task], split=name, checkpoint=args.checkpoint
                )
                logger.info("wrote %s", ", ".join(map(str, files)))
    return 0
