"""From checked flags to a finished run: processes, device, log, then the run itself."""

import argparse
import logging
import os
from typing import Any

import torch

import mra
from mra.control import Control
from mra.training.evaluation import evaluate
from mra.training.run import TrainingRun
from tbps_common.errors import InputError
from tbps_common.run.device import choose_device
from tbps_common.run.distributed import Ranks, process_group
from tbps_common.run.logs import run_log
from tbps_common.run.stop import Interruption

# How long a process waits for the others; one that dies is noticed by the launcher at once.
TIMEOUT_MINUTES = 60

logger = logging.getLogger("mra.training")


def start(config: dict[str, Any], args: argparse.Namespace) -> int:
    """Run what the flags of `Retrieval.py` describe, as one of the processes that were launched.

    Args:
        config: configuration of the task, without the flags.
        args: flags of `build_retrieval_parser`, checked by `mra.preflight.check_run`.

    Returns:
        Exit status: 0, or 130 or 143 after an interruption.

    Raises:
        InputError: the device, the data, the weights or the checkpoint cannot be used.
        OSError: the output folder cannot be written.
        FloatingPointError: the loss is no longer a finite number.
    """
    _adopt_slurm()
    ranks = Ranks.from_environment()
    control = Control.of_this_process()
    status = 1
    try:
        with Interruption() as interruption:
            if control is not None:
                control.announce(ranks.local_rank)
            status = _run(config, args, ranks, interruption)
    except InputError:
        status = 2
        raise
    finally:
        if control is not None and ranks.local_rank == 0:
            control.report(status)
    # torchrun would report a stop that was asked for as a failure; run.py knows better.
    return 0 if control is not None and ranks.distributed and status in (130, 143) else status


def _run(config: dict[str, Any], args: argparse.Namespace, ranks: Ranks, interruption: Interruption) -> int:
    if args.score_world is None:
        args.score_world = ranks.world_size
    args.num_workers = min(args.num_workers, usable_processors())
    device = _device(args.device, ranks)
    with run_log("mra", enabled=ranks.is_main) as log, process_group(device, TIMEOUT_MINUTES) as ranks:
        logger.info("mra %s, torch %s, %d process(es)", mra.__version__, torch.__version__, ranks.world_size)
        precision = "bfloat16 autocast" if device.type == "cuda" else "float32"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        missing = "no GPU found: " if device.type == "cpu" and args.device != "cpu" else ""
        logger.info("%scomputing on %s in %s", missing, name, precision)
        logger.info("scores are combined as by %d process(es) (--score_world)", args.score_world)
        if args.select == "test" and not args.evaluate:
            logger.warning(
                "the best epoch is chosen on the test split, as in the released code; --select val chooses it on the "
                "validation split"
            )
        try:
            if args.evaluate:
                return evaluate(config, args, device, ranks, interruption)
            return TrainingRun(config, args, device, ranks, interruption, log).train()
        except Exception as error:
            logger.error("the run ended: %s", error)
            raise


def usable_processors() -> int:
    """Processors this process may use; what a batch holds does not depend on the number of loader processes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(requested: str, ranks: Ranks) -> torch.device:
    """The device of `--device`, whose default `cuda` means a GPU if there is one."""
    if ranks.distributed and ":" in requested:
        raise InputError(f"--device {requested} is one GPU, but {ranks.world_size} processes run: use --device cuda")
    return choose_device("auto" if requested == "cuda" else requested, ranks.local_rank)


def _adopt_slurm() -> None:
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
    environment.setdefault("MASTER_PORT", "3006")
