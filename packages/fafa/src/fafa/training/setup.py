"""What a run is made of: the model with the flags applied, the processes around it, the directory it writes to."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fafa.checkpoint import load_checkpoint
from fafa.model import Blip2FAFACPR, place
from fafa.model.settings import write_model_config
from fafa.training.run_directory import LOG, back_up_code, create_run_directory, write_hyperparameters
from tbps_common.run.distributed import Ranks, broadcast_object
from tbps_common.run.logs import RunLog

logger = logging.getLogger("fafa.train")

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


def build_model(args: argparse.Namespace, config: Mapping[str, Any], device: torch.device) -> Blip2FAFACPR:
    """The model of a run, in training mode on its device.

    Args:
        args: flags of the run.
        config: resolved model configuration.
        device: where to train.

    Raises:
        InputError: a file of start weights cannot be used.
    """
    model = Blip2FAFACPR.from_config(config)
    if args.resume_path:
        loaded = load_checkpoint(model, args.resume_path, trust=args.trust_checkpoint)
        logger.info(
            "%s loaded: %d keys missing, %d unexpected",
            args.resume_path,
            len(loaded.missing_keys),
            len(loaded.unexpected_keys),
        )
    model = place(model, device)
    model.fda_k, model.fda_alpha, model.use_fda_alpha = args.fda_k, args.fda_alpha, args.use_fda_alpha
    model.dispersion_loss.margin = args.fd_margin
    model.autocast_dtype = _AUTOCAST[args.amp_dtype]
    model.gather = args.gather
    if args.compile:
        model.compile_vit()
    for name in ("fda_k", "fda_alpha", "fd_margin"):
        logger.info("%s = %s", name, getattr(args, name))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    logger.info("%.1fM parameters are trained, %.1fM are frozen", trained / 1e6, frozen / 1e6)
    return model.train()


def distribute(model: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """The model as several processes train it: their gradients are averaged."""
    if not ranks.distributed:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        # The LM head and the matching head never get a gradient, and the reducer would wait for them.
        find_unused_parameters=True,
    )


def open_directory(
    args: argparse.Namespace, config: Mapping[str, Any], ranks: Ranks, log: RunLog, resumed: Path | None
) -> Path:
    """Make the run directory with what is known at the start, or go on in the resumed one; on every process its path."""
    directory = resumed
    if ranks.is_main:
        if directory is None:
            directory = create_run_directory(args.output_dir, args.exp_name)
            write_hyperparameters(directory, args)
            write_model_config(config, directory)
            if not args.no_code_backup:
                back_up_code(directory)
        log.open(directory / LOG, append=resumed is not None)
        logger.info("run directory: %s", directory)
        logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    directory = broadcast_object(directory)
    assert directory is not None
    return directory
