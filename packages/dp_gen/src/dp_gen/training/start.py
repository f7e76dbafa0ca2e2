"""From checked flags to a finished run: accelerator, log, then the run itself."""

import argparse
import importlib.util
import logging
from typing import Any

import torch

import dp_gen
from dp_gen.options import parse_args
from dp_gen.training.run import TrainingRun
from tbps_common.errors import InputError
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks
from tbps_common.run.logs import run_log

logger = logging.getLogger(__name__)


def train(args: argparse.Namespace) -> int:
    """Run the training that `args` describe.

    Args:
        args: flags of `parse_args`, checked by `check_training_flags`.

    Returns:
        Exit status: 0, or 130 or 143 after an interruption whose state was saved.

    Raises:
        InputError: the data, the models or the checkpoint cannot be used.
        OSError: the output folder cannot be written.
        FloatingPointError: the loss is no longer a finite number.
    """
    with run_log("dp_gen", enabled=Ranks.from_environment().is_main) as log:
        accelerator = build_accelerator(args)
        logger.info(
            "dp_gen %s, torch %s, %d process(es)", dp_gen.__version__, torch.__version__, accelerator.num_processes
        )
        precision = "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
        logger.info("%s", device_sentence("auto", accelerator.device, precision))
        _note_flags(args)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(args.allow_tf32)
        try:
            status = TrainingRun(args, accelerator, log).train()
        except Exception as error:
            logger.error("the run ended: %s", error)
            raise
        accelerator.end_training()
        return status


def build_accelerator(args: argparse.Namespace) -> Any:
    """accelerate's `Accelerator` for the flags; it finds devices and processes itself.

    Raises:
        InputError: precision or tracker cannot be used here.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    ranks = Ranks.from_environment()
    try:
        accelerator = Accelerator(
            # accelerate joins several processes into one run on CPUs only when it is told that they are to use them.
            cpu=ranks.distributed and not torch.accelerator.is_available(),
            mixed_precision=args.mixed_precision,
            log_with=trackers(args.report_to),
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.logging_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except (ValueError, ImportError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"accelerate cannot start with --mixed_precision {args.mixed_precision} and --report_to {args.report_to} "
            f"({reason}): change one of them"
        ) from error
    if accelerator.num_processes != ranks.world_size:
        raise InputError(
            f"{ranks.world_size} processes were started, but accelerate joins {accelerator.num_processes}: start them "
            "with accelerate launch or torchrun, with as many processes as there are GPUs, or with --cpu"
        )
    return accelerator


def trackers(report_to: str | None) -> list[Any] | None:
    """Trackers of `--report_to`; by default TensorBoard where it is installed."""
    if report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else None
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    return None if names == ["none"] or not names else names


def _note_flags(args: argparse.Namespace) -> None:
    defaults = parse_args(default=True)
    if args.lr_scheduler == "constant" and args.lr_warmup_steps != defaults.lr_warmup_steps:
        logger.info("--lr_warmup_steps has no effect with --lr_scheduler constant; constant_with_warmup has one")
    if args.enable_xformers_memory_efficient_attention:
        logger.info("PyTorch's scaled-dot-product attention is used in place of xformers")
