"""The training, from top to bottom: what is built, the loop, saving.  `train.py`, `dp-train`, `python -m dp_gen.train`.

accelerate carries devices, processes, mixed precision and checkpoint folders; `dp_gen.resume` finds, writes and restores
those folders; `dp_gen.optim` says what is trained.
"""

import sys

from dp_gen.options import build_parser, parse_args, training_flags

if __name__ == "__main__":
    build_parser().parse_known_args()  # answers --help before torch is imported

import argparse
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import dp_gen
from dp_gen.data.dataset import DiversePersonDataset, collate_fn
from dp_gen.model.attention import checkpoint_gradients, recomputation_contexts
from dp_gen.model.captions import load_tokenizer
from dp_gen.model.diverse_person import DiversePersonModel
from dp_gen.model.parts import load_generation_scheduler, load_training_scheduler
from dp_gen.model.pipeline import DiversePersonPipeline, settings_of
from dp_gen.optim import build_lr_scheduler, build_optimizer, set_trainable
from dp_gen.resume import (
    CheckpointWriter,
    Position,
    find_checkpoint,
    last_good_checkpoint,
    prune,
    read_position,
    remove_partial,
    restore,
    restore_random_state,
)
from dp_gen.tracking import PROJECT, LossHistory, trackers
from tbps_common.errors import InputError
from tbps_common.run.batches import EpochBatches, ReplacedItems, SeededItems, item_seed, replaced_items, usable_workers
from tbps_common.run.command import command
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks, broadcast_object
from tbps_common.run.progress import progress_bar
from tbps_common.run.randomness import seed_worker
from tbps_common.run.session import Run, training_run
from tbps_common.run.stop import FiniteLoss

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

logger = logging.getLogger(__name__)


@command
def main(argv: list[str]) -> int:
    """`python -m dp_gen.train`."""
    return train(training_flags(argv))


def train(args: argparse.Namespace) -> int:
    """Run the training that `args` describe, new or resumed, in one process or in several.

    Args:
        args: flags of `training_flags`; `lr` and `max_train_steps` are filled in.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) after an interruption whose state was saved.

    Raises:
        InputError: the data, the models or the checkpoint cannot be used; nothing is written then.
        OSError: the output folder cannot be written.
        FloatingPointError: the loss is no longer a finite number.
    """
    with training_run("dp_gen", device="cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else "auto") as run:
        accelerator = build_accelerator(args, run.ranks)
        settings = settings_of(argparse.Namespace(**vars(args)))
        output_dir = Path(args.output_dir)
        # Files may appear while the processes start: the main process decides for all where to begin.
        source = broadcast_object(find_checkpoint(output_dir, args.resume_from_checkpoint) if run.is_main else None)
        seed = broadcast_object(choose_seed(args, source) if run.is_main else 0)
        set_seed(seed)

        # What is built.
        noise_scheduler = load_training_scheduler(args)
        tokenizer = load_tokenizer(args.pretrained_model_hf, args.revision, cache_dir=args.cache_dir)
        model = build_model(args, accelerator)
        dataset = DiversePersonDataset(args.dataset_name, tokenizer, args, "train")
        replaced = replaced_items(args.bad_images, len(dataset))
        order = EpochBatches(
            len(dataset),
            args.train_batch_size,
            seed=seed,
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            drop_last=False,
        )
        workers = usable_workers(args.dataloader_num_workers)
        loader = DataLoader(
            SeededItems(dataset, replaced),
            batch_sampler=order,
            collate_fn=collate_fn,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=seed_worker,
            generator=torch.Generator(),  # its base seed is not drawn from the numbers for the noise then
        )
        fill_in_flags(args, order)
        optimizer = build_optimizer(model, args)
        scheduler = build_lr_scheduler(optimizer, args)
        network, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if run.ranks.rank and not args.same_noise_on_ranks:
            torch.manual_seed(item_seed(seed, 0, run.ranks.rank))  # noise of its own for every process
        position = Position()
        if source is not None:
            position = read_position(source, updates_per_epoch(args, order), args.gradient_accumulation_steps)
            most_steps = None if args.scheduler_steps_per_process else position.step
            restore(source, model, optimizer, scheduler, accelerator.scaler, most_steps=most_steps)
            restore_random_state(source, run.ranks.rank)
            logger.info("resuming from %s: update %d, epoch %d", source, position.step, position.epoch + 1)
        position.belongs_to(seed, args.train_batch_size * run.ranks.world_size)
        open_output(args, accelerator, run, settings, first=position.step + 1)

        # The loop.
        keep = (
            partial(prune, output_dir, interval=args.keep_interval)
            if args.keep_only_last_checkpoint
            else (lambda _: None)
        )
        checkpoints = CheckpointWriter(accelerator, model, optimizer, scheduler, output_dir, keep)
        finite = FiniteLoss(accelerator.device, partial(not_finite, args, checkpoints))
        history = LossHistory(accelerator, finite)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stopped = False
        bar = progress_bar(args.max_train_steps, initial=position.step, unit="update", enabled=run.is_main)
        with bar, attention_kernels(args), checkpoints:
            network.train()
            for batches in updates(run, loader, order, position, args, accelerator.device):
                rate = scheduler.get_last_lr()[0]
                losses, norm = update(accelerator, network, batches, noise_scheduler, optimizer, trained, args)
                scheduler.step()

                # With a gradient scaler an overflowing norm is part of the method, and the update was left out.
                checked = losses["loss"] if accelerator.scaler is not None else losses["loss"] + norm
                finite.update(checked, position.step)
                history.add(position.step, losses, norm, rate, sum(len(batch["pix_v"]) for batch in batches))
                bar.set_description(f"Global step: {position.step}", refresh=False)
                bar.update()
                if len(history) >= args.log_every:
                    history.report(bar)
                stopped = run.stop_requested()
                if stopped:
                    break
                if position.step % args.checkpointing_steps == 0:
                    history.report(bar)
                    checkpoints.save(position)
                    report_replaced(replaced, dataset)
            history.report(bar)
            stopped = stopped or position.step < args.max_train_steps
            if stopped:
                checkpoints.save(position)

        # What is left behind.
        report_replaced(replaced, dataset)
        if stopped:
            advice = "resume with --resume_from_checkpoint latest"
            logger.info("stopped after update %d; %s", position.step, advice)
        elif run.is_main:
            scheduler = load_generation_scheduler(args)
            DiversePersonPipeline(model, tokenizer, scheduler, settings).save_pretrained(output_dir)
            logger.info("trained %d updates; the model is in %s", position.step, output_dir)
            logger.info("try it with: python generate.py --finetuned_model_path '%s' ...", output_dir)
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()
        return run.exit_status if stopped else 0


def update(
    accelerator: Accelerator,
    network: Any,
    batches: list[Mapping[str, Tensor]],
    noise_scheduler: Any,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    args: argparse.Namespace,
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of the optimizer on the gradients of some batches: their mean losses, and the norm of the gradients."""
    losses: dict[str, Any] = {}
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(network):
            of_batch = network(batch, noise_scheduler)
            accelerator.backward(of_batch["loss"] / args.gradient_accumulation_steps)
        for name, loss in of_batch.items():
            losses[name] = losses.get(name, 0) + loss.detach() / len(batches)
    norm: Any = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm


def updates(
    run: Run,
    loader: DataLoader[Any],
    order: EpochBatches,
    position: Position,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[list[Mapping[str, Tensor]]]:
    """The batches of each update, on this process's device; `position` counts them.

    Ends after the last update, or early where a signal has ended the loader's processes.
    """
    while position.step < args.max_train_steps:
        if position.batch >= order.batches_per_epoch:
            position.epoch, position.batch = position.epoch + 1, 0
        order.set_position(position.epoch, position.batch)
        gathered: list[Mapping[str, Tensor]] = []
        used = position.batch
        for batch in run.load(loader):
            gathered.append({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
            used += 1
            if len(gathered) == args.gradient_accumulation_steps or used == order.batches_per_epoch:
                position.step, position.batch = position.step + 1, used
                yield gathered
                gathered = []
                if position.step >= args.max_train_steps:
                    return
        if used < order.batches_per_epoch:
            return


def build_accelerator(args: argparse.Namespace, ranks: Ranks) -> Accelerator:
    """accelerate's `Accelerator` for the flags; it finds devices and processes itself.

    Raises:
        InputError: precision or tracker cannot be used here.
    """
    try:
        accelerator = Accelerator(
            # accelerate joins several processes into one run on CPUs only when it is told that they are to use them.
            cpu=ranks.distributed and not torch.accelerator.is_available(),
            mixed_precision=args.mixed_precision,
            log_with=trackers(args.report_to),
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.logging_dir),
            # The loader is ours; for accelerate this only says whether the schedule advances once per update.
            dataloader_config=DataLoaderConfiguration(split_batches=not args.scheduler_steps_per_process),
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
    logger.info("dp_gen %s, torch %s, %d process(es)", dp_gen.__version__, torch.__version__, ranks.world_size)
    precision = "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
    logger.info("%s", device_sentence("auto", accelerator.device, precision))
    if args.lr_scheduler == "constant" and args.lr_warmup_steps != parse_args(default=True).lr_warmup_steps:
        logger.info("--lr_warmup_steps has no effect with --lr_scheduler constant; constant_with_warmup has one")
    if args.enable_xformers_memory_efficient_attention:
        logger.info("PyTorch's scaled-dot-product attention is used in place of xformers")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def choose_seed(args: argparse.Namespace, source: Path | None) -> int:
    """`--seed`, or that of the run which is resumed, or a new one."""
    if args.seed is not None:
        return args.seed
    stored = read_position(source, 1, 1).seed if source else 0
    return stored or int.from_bytes(os.urandom(4), "little")


def build_model(args: argparse.Namespace, accelerator: Accelerator) -> DiversePersonModel:
    """The pretrained parts with a new controller on this process's device, frozen but for what is trained."""
    model = DiversePersonModel.from_pretrained(args)
    names = set_trainable(model, args, DTYPES.get(accelerator.mixed_precision, torch.float32))
    if args.gradient_checkpointing:
        checkpoint_gradients(model.unet, model.capture)
        if args.train_text_encoder:
            encoder = model.text_encoder
            # transformers renamed it; the old name is the only one of the oldest release that this package takes.
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "context_fn": partial(recomputation_contexts, accelerator.device)})
    model.to(accelerator.device)
    if accelerator.device.type == "cuda":
        for part in (model.unet, model.vae):
            part.to(memory_format=torch.channels_last)
    if args.compile:
        parts = [model.image_encoder, model.text_encoder, model.vae.encoder]
        for part in parts if model.capture else [*parts, model.unet]:
            part.compile()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%.1fM parameters are trained, in %d tensors", count / 1e6, len(names))
    return model


def updates_per_epoch(args: argparse.Namespace, order: EpochBatches) -> int:
    return -(-order.batches_per_epoch // args.gradient_accumulation_steps)


def fill_in_flags(args: argparse.Namespace, order: EpochBatches) -> None:
    """`--max_train_steps` where only epochs were given, and `--lr` for `--scale_lr`."""
    per_epoch, samples = updates_per_epoch(args, order), args.train_batch_size * order.world_size
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * per_epoch
    if args.scale_lr:
        args.lr *= args.gradient_accumulation_steps * samples
    logger.info("%d training samples, %d batches per epoch", order.size, order.batches_per_epoch)
    epochs = -(-args.max_train_steps // per_epoch)
    logger.info("%d updates of %d in %d epochs", args.max_train_steps, samples, epochs)


def open_output(
    args: argparse.Namespace, accelerator: Accelerator, run: Run, settings: dict[str, Any], *, first: int
) -> None:
    """Make the folders, begin the log file and the trackers.

    Args:
        args: flags of the training.
        accelerator: gets the trackers.
        run: has the log.
        settings: content of `dp_gen_config.json`.
        first: the update that comes next.
    """
    output_dir = Path(args.output_dir)
    if run.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        Path(args.logging_dir).mkdir(parents=True, exist_ok=True)
        remove_partial(output_dir)
        run.log.open(output_dir / "train_log.txt", append=first > 1)
        logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in settings["args"].items()))
    accelerator.wait_for_everyone()
    flags = {name: value for name, value in settings["args"].items() if value is not None}
    # Points that a killed run logged after its last checkpoint are dropped.
    accelerator.init_trackers(PROJECT, config=flags, init_kwargs={"tensorboard": {"purge_step": first}})


def report_replaced(replaced: ReplacedItems | None, dataset: DiversePersonDataset) -> None:
    """Name images that could not be read since the last time; every process must call it."""
    if replaced is not None and (sentence := replaced.report(dataset.image_path)):
        logger.warning("%s", sentence)


def not_finite(args: argparse.Namespace, checkpoints: CheckpointWriter, step: int) -> str:
    checkpoints.wait()
    kept = last_good_checkpoint(Path(args.output_dir))
    last = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written yet"
    return (
        f"the loss or its gradient is not a finite number at update {step} (learning rate {args.lr:.2e}); {last}; a "
        "lower --lr, or --mixed_precision no, usually helps"
    )


def attention_kernels(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Without the flash kernel, if `--disable_flashattention` says so."""
    if not args.disable_flashattention:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])


if __name__ == "__main__":
    sys.exit(main())
