"""One process of a run, whoever has started it: `run.py`, torchrun, Slurm, or a person."""

import argparse
import logging
import os
from typing import Any

import torch

import mra
from mra.evaluate import evaluate
from mra.launch import MASTER_PORT, LaunchFolder
from mra.preflight import Annotation
from mra.train import train
from tbps_common.errors import InputError
from tbps_common.run.batches import usable_workers
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks
from tbps_common.run.session import training_run

# How long a process waits for the others; the launcher notices at once if one dies.
TIMEOUT_MINUTES = 60

logger = logging.getLogger("mra.launched")


def run_launched(config: dict[str, Any], args: argparse.Namespace, annotation: Annotation) -> int:
    """Train or evaluate as the flags of `Retrieval.py` say.

    Args:
        config: configuration of the task, without the flags.
        args: flags of `build_retrieval_parser`, checked by `mra.preflight.check_run`.
        annotation: as far as `check_run` has read it.

    Returns:
        Exit status: 0, 1 if `--require_published` is not met, or 130 or 143 after an interruption.

    Raises:
        InputError: the device, the data, the weights or the checkpoint cannot be used.
        OSError: the output folder cannot be written.
        FloatingPointError: the loss is no longer a finite number.
    """
    adopt_slurm()
    ranks, launched, status = Ranks.from_environment(), LaunchFolder.of_this_process(), 1
    if args.score_world is None:
        args.score_world = ranks.world_size
    args.num_workers = usable_workers(args.num_workers)
    # The default cuda means a GPU if there is one.
    requested = "auto" if args.device == "cuda" else args.device
    try:
        if ranks.distributed and ":" in args.device:
            raise InputError(
                f"--device {args.device} is one GPU, but {ranks.world_size} processes run: use --device cuda"
            )
        with training_run("mra", device=requested, timeout_minutes=TIMEOUT_MINUTES) as run:
            if launched is not None:
                launched.announce(ranks.local_rank)
            logger.info("mra %s, torch %s, %d process(es)", mra.__version__, torch.__version__, ranks.world_size)
            precision = "bfloat16 autocast" if run.device.type == "cuda" else "float32"
            logger.info("%s", device_sentence(requested, run.device, precision))
            logger.info("scores are combined as by %d process(es) (--score_world)", args.score_world)
            status = (evaluate if args.evaluate else train)(config, args, run, annotation)
    except InputError:
        status = 2
        raise
    finally:
        if launched is not None and ranks.local_rank == 0:
            launched.report(status)
    # torchrun would report a stop that was asked for, or a result that is not the published one, as a crash; run.py knows better.
    return 0 if launched is not None and ranks.distributed and status in (1, 130, 143) else status


def adopt_slurm() -> None:
    """Let Slurm's variables stand for those of torchrun, where only Slurm has started the processes.

    Raises:
        InputError: nobody has said where the first process is.
    """
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1") or 1) < 2 or "SLURM_PROCID" not in environment:
        return
    if not environment.get("MASTER_ADDR"):
        raise InputError(
            "Slurm has started several processes, and MASTER_ADDR is not set: set it to the host name of the first node"
        )
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_PORT", str(MASTER_PORT))
