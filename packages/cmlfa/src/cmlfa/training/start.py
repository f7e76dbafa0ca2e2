"""From checked flags to a finished run: processes, device, log, then the run itself."""

import argparse
import logging
import os

import torch

import cmlfa
from cmlfa.model.cmlfa import resolve_precision
from cmlfa.options import default_options
from cmlfa.training.run import TrainingRun
from tbps_common.run.device import choose_device, device_sentence
from tbps_common.run.distributed import Ranks, process_group
from tbps_common.run.logs import run_log

# The other processes wait while the main one evaluates. A process that dies is noticed by torchrun at once.
TIMEOUT_MINUTES = 120

logger = logging.getLogger("IRRA.train")


def train(args: argparse.Namespace) -> int:
    """Run the training that `args` describe.

    Args:
        args: flags of `get_args`, checked by `check_training_flags`.

    Returns:
        Exit status: 0, or 130 or 143 after an interruption whose state was saved.

    Raises:
        InputError: the device, the data, the weights or the checkpoint cannot be used.
        OSError: the run directory cannot be written.
        FloatingPointError: the loss or the weights are no longer finite numbers.
    """
    if args.local_rank and "LOCAL_RANK" not in os.environ:
        # The launcher before torchrun passed --local_rank instead of setting the variable.
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    ranks = Ranks.from_environment()
    device = choose_device(args.device, ranks.local_rank)
    with run_log("IRRA", "cmlfa", enabled=ranks.is_main) as log, process_group(device, TIMEOUT_MINUTES) as ranks:
        precision = resolve_precision(args.precision, device.type)
        logger.info("cmlfa %s, torch %s, %d process(es)", cmlfa.__version__, torch.__version__, ranks.world_size)
        logger.info("%s", device_sentence(args.device, device, precision))
        _warn_of_dead_flags(args)
        try:
            return TrainingRun(args, device, ranks, log).train()
        except Exception as error:
            logger.error("the run ended: %s", error)
            raise


def _warn_of_dead_flags(args: argparse.Namespace) -> None:
    defaults = default_options()
    for name in ("masked_token_rate", "masked_token_unchanged_rate"):
        if getattr(args, name) != defaults[name]:
            logger.warning("--%s has no effect: masking uses fixed probabilities, as in the released code", name)
