"""The fine-tuning of a diffusion model on the target data set: steps, state to go on from, result."""

import argparse
import contextlib
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mra.dad.denoiser import build_networks, save_weights
from mra.dad.finetune import LOG_NAME, MANIFEST_NAME, STATE_NAME
from mra.dad.models import choose_dtype
from mra.dad.pairs import Pairs
from mra.dad.work import digest, versions
from tbps_common.datasets import ProcessedTrain
from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import write_json, write_text
from tbps_common.run.batches import EpochBatches, SeededItems, replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks, barrier, broadcast_object
from tbps_common.run.logs import RunLog
from tbps_common.run.randomness import all_rng_states, seed_everything, seed_worker, set_rng_state
from tbps_common.run.stop import AgreedStop, FiniteLoss, Interruption

logger = logging.getLogger("mra.dad")

VERSION = 1


@dataclass
class Progress:
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


class Alignment:
    """One run, new or gone on with. Nothing is written before the model and the data have been found usable.

    Args:
        args: flags of `mra-dad finetune`.
        data: training pairs, whose images are there.
        device: where this process computes.
        ranks: place of this process among all.
        interruption: entered already.
        log: of the run.

    Raises:
        InputError: model or state cannot be used, or the data do not fill a batch.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: ProcessedTrain,
        device: torch.device,
        ranks: Ranks,
        interruption: Interruption,
        log: RunLog,
    ):
        self.args, self.device, self.ranks = args, device, ranks
        self.interruption, self.log = interruption, log
        self.out = Path(args.out)
        seed_everything(args.seed, deterministic=device.type == "cpu")
        self.batches = EpochBatches(
            len(data.captions),
            args.batch_size * args.accumulate,
            seed=args.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self.dtype = choose_dtype(args.precision, device, on_gpu="bf16")
        self.networks = build_networks(
            args.model,
            args.method,
            (args.height, args.width),
            device,
            self.dtype,
            lora_rank=args.lora_rank,
            gradient_checkpointing=args.gradient_checkpointing,
        )
        denoiser = self.networks.denoiser
        self.trained = denoiser.trained()
        self.module: nn.Module = denoiser
        if ranks.distributed:
            ids = [device.index] if device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(denoiser, device_ids=ids)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, eps=1e-8
        )
        self.rates = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.finite = FiniteLoss(device)
        schedule = self.networks.schedule
        pairs = Pairs(
            data,
            self.networks.tokenizer,
            (args.height, args.width),
            self.networks.latent,
            schedule.config.num_train_timesteps,
            args.empty_prompts,
        )
        self._image_path = data.image_paths.__getitem__
        self._replaced = replaced_items(args.bad_images, len(pairs))
        self.loader = DataLoader(
            SeededItems(pairs, self._replaced),
            batch_sampler=self.batches,
            num_workers=args.num_workers,
            worker_init_fn=seed_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(args.seed),
        )
        self.settings = self._settings(data)
        self.progress = self._resume() if (self.out / STATE_NAME).is_file() else Progress()

    def train(self) -> int:
        """Train to the end, or until interrupted; returns the exit status."""
        args, progress = self.args, self.progress
        total = args.epochs * self.batches.batches_per_epoch
        written = progress.steps >= total and broadcast_object(self._is_written())
        if self.ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log.open(self.out / "run.log", append=progress.steps > 0)
            write_text(self.out / LOG_NAME, "".join(f"{line}\n" for line in progress.log))
            self._write_manifest(finished=written)
        count = sum(parameter.numel() for parameter in self.trained.values())
        precision = str(self.dtype).removeprefix("torch.")
        logger.info("%s; %d trained parameters", device_sentence(args.device, self.device, precision), count)
        per_step = args.batch_size * args.accumulate * self.ranks.world_size
        logger.info("%d steps of %d pairs, %d done", total, per_step, progress.steps)
        if written:
            logger.info("the training is finished: %s", self.out / args.method)
            return 0
        stop = AgreedStop(self.interruption, self.ranks)
        for epoch in range(progress.epoch, args.epochs):
            if not self._train_epoch(epoch, total, stop):
                self._save()
                logger.info("stopped after step %d: the same command goes on", progress.steps)
                return self.interruption.exit_status
            progress.epoch, progress.batch = epoch + 1, 0
            self._save()
        self._require_finite()
        if self.ranks.is_main:
            save_weights(self.networks.denoiser, self.out / args.method)
            self._write_manifest(finished=True)
        barrier()
        rate = progress.steps * per_step / max(progress.seconds, 1e-9)
        logger.info("%s: %d steps, %.2f pairs per second", self.out / args.method, progress.steps, rate)
        return 0

    def _train_epoch(self, epoch: int, total: int, stop: AgreedStop) -> bool:
        """Train what is left of an epoch; False if the run was asked to stop."""
        from tqdm import tqdm

        args, progress = self.args, self.progress
        self.batches.set_position(epoch, progress.batch)
        started = time.perf_counter()
        losses = torch.zeros((), device=self.device)
        shown = self.ranks.is_main
        with tqdm(
            total=total, initial=progress.steps, unit="step", dynamic_ncols=True, disable=None if shown else True
        ) as bar:
            for batch in self.loader:
                loss = self._step(batch)
                losses += loss
                progress.steps += 1
                progress.batch += 1
                progress.loss_count += 1
                self.finite.update(loss, progress.steps)
                bar.update()
                # Everything below asks the same of every process.
                due = progress.steps % args.log_every == 0 or progress.steps == total
                stopping = stop()
                saving = progress.steps % args.save_every == 0 and progress.batch < self.batches.batches_per_epoch
                if due or stopping or saving or progress.batch == self.batches.batches_per_epoch:
                    self._require_finite()
                    progress.loss_sum += self._mean_over_processes(losses)
                    losses.zero_()
                    progress.seconds += time.perf_counter() - started
                    started = time.perf_counter()
                if due:
                    self._log(epoch)
                if stopping:
                    return False
                if saving:
                    self._save()
                    started = time.perf_counter()
        return True

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        """One optimizer step over `accumulate` batches; returns the mean loss, which stays on the device."""
        args = self.args
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number in range(args.accumulate):
            chosen = slice(number * args.batch_size, (number + 1) * args.batch_size)
            part = {name: value[chosen].to(self.device, non_blocking=True) for name, value in batch.items()}
            last = number + 1 == args.accumulate
            with contextlib.nullcontext() if last or not self.ranks.distributed else self.module.no_sync():  # type: ignore[operator]
                loss = self._loss(part) / args.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if args.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained.values(), args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rates.step()
        return total

    def _loss(self, part: dict[str, Tensor]) -> Tensor:
        """Mean squared error of the predicted noise (paper, section on DaD)."""
        networks, timesteps = self.networks, part["timestep"]
        latents = networks.latents(part["pixels"], part["encoding_noise"])
        noisy = networks.schedule.add_noise(latents, part["noise"], timesteps)
        text = networks.text(part["ids"])
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            predicted = self.module(noisy.to(self.dtype), timesteps, text)
        return F.mse_loss(predicted.float(), networks.target(latents, part["noise"], timesteps))

    def _mean_over_processes(self, losses: Tensor) -> float:
        if self.ranks.distributed:
            losses = losses.clone()
            dist.all_reduce(losses)
            losses /= self.ranks.world_size
        return float(losses)

    def _require_finite(self) -> None:
        bad = self.finite.first_bad_iteration()
        if bad:
            raise InputError(
                f"the loss of step {bad} is not a finite number (learning rate {self.args.lr:g}): lower --lr, or use "
                f"--precision fp32; {self.out / STATE_NAME} is the last good state, if there is one"
            )

    def _log(self, epoch: int) -> None:
        progress = self.progress
        mean = progress.loss_sum / max(progress.loss_count, 1)
        progress.loss_sum, progress.loss_count = 0.0, 0
        rate = self.optimizer.param_groups[0]["lr"]
        line = json.dumps({"step": progress.steps, "epoch": epoch, "loss": round(mean, 6), "lr": rate})
        progress.log.append(line)
        logger.info("step %d, epoch %d: loss %.4f", progress.steps, epoch, mean)
        if self.ranks.is_main:
            with open(self.out / LOG_NAME, "a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")

    def _settings(self, data: ProcessedTrain) -> dict[str, Any]:
        """What the course of a run depends on, but for its length."""
        args = self.args
        names = ("model", "method", "height", "width", "lr", "warmup", "weight_decay", "clip", "empty_prompts", "seed")
        return {
            **{name: getattr(args, name) for name in (*names, "precision")},
            "lora_rank": args.lora_rank if args.method == "lora" else None,
            "pairs_per_step": args.batch_size * args.accumulate * self.ranks.world_size,
            "pairs": digest(*data.captions, *data.image_paths),
        }

    def _is_written(self) -> bool:
        """Whether the weights of the state gone on from lie in `--out`, not those of a shorter run before."""
        try:
            manifest = json.loads((self.out / MANIFEST_NAME).read_text(encoding="utf-8"))
            same = manifest["finished"] is True and manifest["steps"] == self.progress.steps > 0
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return same and (self.out / self.args.method).is_dir()

    def _write_manifest(self, *, finished: bool) -> None:
        progress = self.progress
        last = json.loads(progress.log[-1])["loss"] if progress.log else None
        write_json(
            self.out / MANIFEST_NAME,
            {
                "settings": self.settings,
                "epochs": self.args.epochs,
                "processes": self.ranks.world_size,
                "libraries": versions(),
                "finished": finished,
                "steps": progress.steps,
                "loss": last,
                "seconds": round(progress.seconds, 3),
            },
        )

    def _save(self) -> None:
        if self._replaced is not None and (sentence := self._replaced.report(self._image_path)):
            logger.warning("%s", sentence)
        states = all_rng_states(self.ranks)
        if self.ranks.is_main:
            state = {
                "version": VERSION,
                "settings": self.settings,
                "progress": asdict(self.progress),
                "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
                "rates": self.rates.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": states,
            }
            save_checkpoint(state, self.out / STATE_NAME)
        barrier()

    def _resume(self) -> Progress:
        path = self.out / STATE_NAME
        stored = load_checkpoint_file(path)
        try:
            if stored["version"] != VERSION:
                raise CheckpointError(f"{path} was written by another version of this program: choose another --out")
            self._require_same(stored["settings"])
            progress = Progress(**stored["progress"])
            weights: dict[str, Tensor] = stored["weights"]
            if weights.keys() != self.trained.keys():
                raise CheckpointError(f"{path} holds other weights than --model {self.args.model} has")
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(weights[name])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.scaler.load_state_dict(stored["scaler"])
            self.rates.load_state_dict(stored["rates"])
            states = stored["rng"]
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(
                f"{path} is not the state of a fine-tuning ({type(error).__name__}: {error}): delete it, or choose another "
                "--out"
            ) from error
        if len(states) == self.ranks.world_size:
            set_rng_state(states[self.ranks.rank])
        logger.info("going on from %s: %d steps done", path, progress.steps)
        return progress

    def _require_same(self, before: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{self.out / STATE_NAME} was begun with {name}={before.get(name)!r}, and this run has "
                    f"{name}={value!r}: use the same flags, or another --out"
                )
