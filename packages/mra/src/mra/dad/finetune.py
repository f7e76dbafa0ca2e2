"""`mra-dad finetune`: align a text-to-image model with the pairs of a training set (paper, section on DaD)."""

import argparse
import contextlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mra.dad.denoiser import Networks, build_networks, save_weights
from mra.dad.options import LEARNING_RATES
from mra.dad.records import EXTRA, MODEL_FILES, digest, versions
from tbps_common.datasets import ProcessedTrain, load_processed_train
from tbps_common.errors import CheckpointError, DatasetError, InputError
from tbps_common.files import write_json, write_text
from tbps_common.images import check_images_exist, read_image
from tbps_common.pipeline.models import choose_dtype, require_libraries, require_model
from tbps_common.run.batches import EpochBatches, SeededItems, replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import barrier, broadcast_object
from tbps_common.run.progress import progress_bar
from tbps_common.run.randomness import seed_everything, seed_worker, set_rng_state
from tbps_common.run.session import Run, training_run
from tbps_common.run.state import restore_state, save_state
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("mra.dad")

MANIFEST_NAME, STATE_NAME, LOG_NAME = "manifest.json", "last.pth", "log.jsonl"
VERSION = 1
_SETTINGS = "model method height width lr warmup weight_decay clip empty_prompts seed precision".split()


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0
    batch: int = 0
    """Steps done of the epoch."""
    steps: int = 0
    loss_sum: float = 0.0
    """Of the steps since the last log line."""
    loss_count: int = 0
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)


def main(args: argparse.Namespace) -> int:
    """Check flags and pairs, then train; returns the exit status.

    Raises:
        InputError: flags, pairs, the model or the state of an earlier run cannot be used.
        FloatingPointError: a loss is not a finite number.
    """
    extra = ("diffusers", "accelerate", *(("peft",) if args.method == "lora" else ()))
    require_libraries("mra-dad finetune", EXTRA, *extra)
    require_model("--model", args.model, *MODEL_FILES)
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
    with training_run("mra.dad", device=args.device) as run:
        return train(args, data, run)


def train(args: argparse.Namespace, data: ProcessedTrain, run: Run) -> int:
    """Train to the end, or until interrupted; returns the exit status.

    Nothing is written before the model and the data have been found usable.

    Args:
        args: flags of `mra-dad finetune`.
        data: training pairs, whose images are there.
        run: of this process.
    """
    out, device, ranks = Path(args.out), run.device, run.ranks
    seed_everything(args.seed, deterministic=device.type == "cpu")
    batches = EpochBatches(
        len(data.captions),
        args.batch_size * args.accumulate,
        seed=args.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    dtype, size = choose_dtype(args.precision, device, on_gpu="bf16"), (args.height, args.width)
    networks = build_networks(
        args.model,
        args.method,
        size,
        device,
        dtype,
        lora_rank=args.lora_rank,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    trained = networks.denoiser.trained()
    module = run.distribute(networks.denoiser)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, eps=1e-8
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    pairs = Pairs(
        data,
        networks.tokenizer,
        size,
        networks.latent,
        networks.schedule.config.num_train_timesteps,
        args.empty_prompts,
    )
    replaced = replaced_items(args.bad_images, len(pairs))
    loader = DataLoader(
        SeededItems(pairs, replaced),
        batch_sampler=batches,
        num_workers=args.num_workers,
        worker_init_fn=seed_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed),
    )
    per_step = args.batch_size * args.accumulate * ranks.world_size
    settings = {
        **{name: getattr(args, name) for name in _SETTINGS},
        "lora_rank": args.lora_rank if args.method == "lora" else None,
        "pairs_per_step": per_step,
        "pairs": digest(*data.captions, *data.image_paths),
    }
    parts = {"optimizer": optimizer, "rates": rates, "scaler": scaler}
    position = _resume(out / STATE_NAME, settings, trained, parts, run)
    if position.batch == batches.batches_per_epoch:
        position.epoch, position.batch = position.epoch + 1, 0
    total = args.epochs * batches.batches_per_epoch
    written = position.steps >= total and broadcast_object(_is_written(out, args.method, position.steps))
    if run.is_main:
        out.mkdir(parents=True, exist_ok=True)
        run.log.open(out / "run.log", append=position.steps > 0)
        write_text(out / LOG_NAME, "".join(f"{line}\n" for line in position.log))
        _write_manifest(args, settings, position, run, finished=written)
    count = sum(parameter.numel() for parameter in trained.values())
    precision = str(dtype).removeprefix("torch.")
    logger.info("%s; %d trained parameters", device_sentence(args.device, device, precision), count)
    logger.info("%d steps of %d pairs, %d done", total, per_step, position.steps)
    if written:
        logger.info("the training is finished: %s", out / args.method)
        return 0

    def save() -> None:
        if replaced is not None and (sentence := replaced.report(data.image_paths.__getitem__)):
            logger.warning("%s", sentence)
        weights = {name: parameter.detach() for name, parameter in trained.items()}
        plain = {"version": VERSION, "settings": settings, "progress": asdict(position), "weights": weights}
        save_state(out / STATE_NAME, ranks, parts, **plain)
        barrier()

    finite = FiniteLoss(device, partial(_not_finite, args))
    losses, started = torch.zeros((), device=device), time.perf_counter()
    stopping = False
    with progress_bar(total, initial=position.steps, unit="step", enabled=run.is_main) as bar:
        for epoch in range(position.epoch, args.epochs):
            batches.set_position(epoch, position.batch)
            for batch in run.load(loader):
                optimizer.zero_grad(set_to_none=True)
                loss = _backward(args, run, module, networks, batch, scaler)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf)
                scaler.step(optimizer)
                scaler.update()
                rates.step()
                losses += loss
                position.steps += 1
                position.batch += 1
                position.loss_count += 1
                finite.update(loss, position.steps)
                bar.update()
                # Everything below asks the same of every process.
                stopping = run.stop_requested()
                if position.batch == batches.batches_per_epoch:
                    position.epoch, position.batch = epoch + 1, 0
                logging_is_due = position.steps % args.log_every == 0 or position.steps == total
                saving_is_due = position.steps % args.save_every == 0 or position.batch == 0
                if logging_is_due or saving_is_due or stopping:
                    finite.require()
                    position.loss_sum += _mean_over_processes(losses, run)
                    losses.zero_()
                    position.seconds += time.perf_counter() - started
                    started = time.perf_counter()
                if logging_is_due:
                    _log(out / LOG_NAME, position, epoch, optimizer.param_groups[0]["lr"], run)
                if saving_is_due:
                    save()
                    started = time.perf_counter()
                if stopping:
                    break
            if stopping or position.batch:  # or the signal has ended the loader's processes
                save()
                logger.info("stopped after step %d: run the same command again to continue", position.steps)
                return run.exit_status
    if run.is_main:
        save_weights(networks.denoiser, out / args.method)
        _write_manifest(args, settings, position, run, finished=True)
    barrier()
    rate = position.steps * per_step / max(position.seconds, 1e-9)
    logger.info("%s: %d steps, %.2f pairs per second", out / args.method, position.steps, rate)
    return 0


def _backward(
    args: argparse.Namespace, run: Run, module: Any, networks: Networks, batch: Mapping[str, Tensor], scaler: Any
) -> Tensor:
    """Gradients of `accumulate` batches, exchanged with the last one; returns the mean loss, which stays on the device."""
    total = torch.zeros((), device=run.device)
    for number in range(args.accumulate):
        chosen = slice(number * args.batch_size, (number + 1) * args.batch_size)
        part = {name: value[chosen].to(run.device, non_blocking=True) for name, value in batch.items()}
        last = number + 1 == args.accumulate
        with contextlib.nullcontext() if last or not run.ranks.distributed else module.no_sync():
            loss = noise_loss(module, networks, part) / args.accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def noise_loss(module: nn.Module, networks: Networks, part: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of the predicted noise (paper, section on DaD), a scalar.

    Args:
        module: the denoiser, perhaps distributed.
        networks: the frozen parts.
        part: items of `Pairs`, batched.
    """
    timesteps, dtype = part["timestep"], networks.vae.dtype
    latents = networks.latents(part["pixels"], part["encoding_noise"])
    noisy = networks.schedule.add_noise(latents, part["noise"], timesteps)
    text = networks.text(part["ids"])
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        predicted = module(noisy.to(dtype), timesteps, text)
    return F.mse_loss(predicted.float(), networks.target(latents, part["noise"], timesteps))


class Pairs(Dataset[dict[str, Tensor]]):
    """Image-caption pairs for a diffusion model.

    Noise and time step are drawn with the item, from the seed that `tbps_common.run.batches.SeededItems` gives it, so that
    they do not depend on batch size, processes or an interruption.

    Args:
        data: the training pairs.
        tokenizer: of the diffusion model.
        size: height and width to which pictures are resized.
        latent: shape of a latent picture, `(channels, height, width)`.
        timesteps: length of the noise schedule.
        empty_prompts: share of the captions that are replaced by the empty one.
    """

    def __init__(
        self,
        data: ProcessedTrain,
        tokenizer: Any,
        size: tuple[int, int],
        latent: tuple[int, int, int],
        timesteps: int,
        empty_prompts: float = 0.0,
    ):
        self.data, self.tokenizer, self.size = data, tokenizer, size
        self.latent, self.timesteps, self.empty_prompts = latent, timesteps, empty_prompts

    def __len__(self) -> int:
        return len(self.data.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        height, width = self.size
        picture = read_image(self.data.image_paths[index]).resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w) in -1..1
        caption = "" if random.random() < self.empty_prompts else self.data.captions[index]
        ids = self.tokenizer(
            caption,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids[0]
        return {
            "pixels": pixels,
            "ids": ids,  # (tokens,)
            "encoding_noise": torch.randn(self.latent),
            "noise": torch.randn(self.latent),
            "timestep": torch.randint(self.timesteps, ()),
        }


def _mean_over_processes(losses: Tensor, run: Run) -> float:
    if run.ranks.distributed:
        losses = losses.clone()
        torch.distributed.all_reduce(losses)
        losses /= run.ranks.world_size
    return float(losses)


def _not_finite(args: argparse.Namespace, step: int) -> str:
    return (
        f"the loss of step {step} is not a finite number (learning rate {args.lr:g}): lower --lr, or use --precision fp32; "
        f"{Path(args.out) / STATE_NAME} is the last good state, if there is one"
    )


def _log(path: Path, position: Position, epoch: int, rate: float, run: Run) -> None:
    mean = position.loss_sum / max(position.loss_count, 1)
    position.loss_sum, position.loss_count = 0.0, 0
    line = json.dumps({"step": position.steps, "epoch": epoch, "loss": round(mean, 6), "lr": rate})
    position.log.append(line)
    logger.info("step %d, epoch %d: loss %.4f", position.steps, epoch, mean)
    if run.is_main:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")


def _is_written(out: Path, method: str, steps: int) -> bool:
    """Whether the weights of the state gone on from lie in `--out`, not those of a shorter run before."""
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
        same = manifest["finished"] is True and manifest["steps"] == steps > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and (out / method).is_dir()


def _write_manifest(
    args: argparse.Namespace, settings: dict[str, Any], position: Position, run: Run, *, finished: bool
) -> None:
    write_json(
        Path(args.out) / MANIFEST_NAME,
        {
            "settings": settings,
            "epochs": args.epochs,
            "processes": run.ranks.world_size,
            "libraries": versions(),
            "finished": finished,
            "steps": position.steps,
            "loss": json.loads(position.log[-1])["loss"] if position.log else None,
            "seconds": round(position.seconds, 3),
        },
    )


def _resume(
    path: Path, settings: dict[str, Any], trained: dict[str, nn.Parameter], parts: dict[str, Any], run: Run
) -> Position:
    """Load the last state and this process's random state, if there are any; returns how far the run is.

    Raises:
        InputError: the state is another run's, or cannot be read.
    """
    if not path.is_file():
        return Position()
    stored = load_checkpoint_file(path)
    try:
        if stored["version"] != VERSION:
            raise CheckpointError(f"{path} was written by another version of this program: choose another --out")
        for name, value in settings.items():
            if stored["settings"].get(name) != value:
                raise InputError(
                    f"{path} was begun with {name}={stored['settings'].get(name)!r}, and this run has {name}={value!r}: "
                    "use the same flags, or another --out"
                )
        position, weights = Position(**stored["progress"]), stored["weights"]
        if weights.keys() != trained.keys():
            raise CheckpointError(f"{path} holds other weights than --model {settings['model']} has")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the state of a fine-tuning ({type(error).__name__}: {error}): delete it, or choose another "
            "--out"
        ) from error
    rng = restore_state(stored, parts, run.ranks, source=path)
    if rng is not None:
        set_rng_state(rng)
    logger.info("resuming from %s: %d steps done", path, position.steps)
    return position
