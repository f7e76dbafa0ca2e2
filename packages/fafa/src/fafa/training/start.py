"""From checked flags to a finished run: processes, device, log, then the run itself."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

import fafa
from fafa.preflight import RunInputs
from fafa.training.precision import StepPrecision
from fafa.training.run import TrainingRun
from tbps_common.datasets.table import log_table
from tbps_common.run.device import choose_device, device_sentence
from tbps_common.run.distributed import Ranks, process_group
from tbps_common.run.logs import run_log

# Processes wait for each other's part of a validation. One that dies is noticed by torchrun at once.
TIMEOUT_MINUTES = 120

logger = logging.getLogger("fafa.train")


def train(
    args: argparse.Namespace, inputs: RunInputs, *, resumed: Path | None = None, warnings: Sequence[str] = ()
) -> int:
    """Run the training that `args` describe.

    Args:
        args: flags, checked by `check_training_flags`.
        inputs: what `check_training_inputs` read.
        resumed: run directory to go on with.
        warnings: sentences for the log.

    Returns:
        Exit status: 0, or 130 or 143 after an interruption whose state was saved.

    Raises:
        InputError: the device, the weights or the state cannot be used.
        OSError: the run directory cannot be written.
        FloatingPointError: the loss or the weights are no longer finite numbers.
    """
    ranks = Ranks.from_environment()
    device = choose_device(args.device, ranks.local_rank)
    with run_log("fafa", enabled=ranks.is_main) as log, process_group(device, TIMEOUT_MINUTES) as ranks:
        precision = StepPrecision(args.amp_dtype, device).name
        logger.info("fafa %s, torch %s, %d process(es)", fafa.__version__, torch.__version__, ranks.world_size)
        logger.info("%s", device_sentence(args.device, device, precision))
        logger.info("save_memory = %s", args.save_memory)
        for warning in warnings:
            logger.warning("%s", warning)
        query, gallery = inputs.itcpr.query, inputs.itcpr.gallery
        rows = [
            (name, len(set(part["instance_ids"])), len(part["img_paths"]))
            for name, part in (("query", query), ("gallery", gallery))
        ]
        log_table("ITCPR", ("subset", "iids", "images"), rows)
        logger.info("SynCPR: %d triplets", len(inputs.records))
        try:
            return TrainingRun(args, inputs, device, ranks, log, resumed).train()
        except Exception as error:
            logger.error("the run ended: %s", error)
            raise
