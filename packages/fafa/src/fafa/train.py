"""The training of FAFA (paper section 4), from checked flags to a finished run: what is built, the loop, what is saved."""

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fafa
from fafa.checkpoint import load_checkpoint, save_model
from fafa.data import SynCPRDataset, train_loader
from fafa.evaluation import Validator
from fafa.features import ExtractionStopped
from fafa.inputs import TrainingInputs
from fafa.model.fafa import Blip2FAFACPR, place
from fafa.optim import build_optimizer, build_scheduler
from fafa.options import TrainingFlags
from fafa.processors import BlipCaptionProcessor
from fafa.run_directory import (
    BEST_BY_EPOCH,
    BEST_BY_STEP,
    LAST,
    LOG,
    STATE,
    TABLES,
    WEIGHTS,
    closing_lines,
    create_run_directory,
    record_flags,
    write_table,
)
from fafa.training_state import FORMAT, Progress, TrainedWeights, read_state, require_same_run, save_frozen
from fafa.transforms import build_transforms
from tbps_common.datasets.table import log_table
from tbps_common.run.batches import EpochBatches, usable_workers
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import broadcast_object
from tbps_common.run.meters import Meters
from tbps_common.run.precision import StepPrecision
from tbps_common.run.progress import progress_bar
from tbps_common.run.randomness import seed_everything, set_rng_state
from tbps_common.run.session import Run, training_run
from tbps_common.run.state import require_finite_weights, restore_state, save_state
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("fafa.train")

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


def train(
    args: TrainingFlags, inputs: TrainingInputs, *, resumed: Path | None = None, warnings: Sequence[str] = ()
) -> int:
    """Run the training that `args` describe.

    Args:
        args: flags, checked by `check_training_flags`; `seed` is filled in.
        inputs: annotations and model configuration.
        resumed: run directory to go on with.
        warnings: sentences for the log.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) after an interruption whose state was saved.

    Raises:
        InputError: the device, the data, the weights or the state cannot be used.
        OSError: the run directory cannot be written.
        FloatingPointError: the loss or the weights are no longer finite numbers.
    """
    with training_run("fafa", device=args.device) as run:
        precision = StepPrecision(args.amp_dtype, run.device).name
        logger.info("fafa %s, torch %s, %d process(es)", fafa.__version__, torch.__version__, run.ranks.world_size)
        logger.info("%s", device_sentence(args.device, run.device, precision))
        logger.info("save_memory = %s", args.save_memory)
        for warning in warnings:
            logger.warning("%s", warning)
        parts = {"query": inputs.itcpr.query, "gallery": inputs.itcpr.gallery}
        rows = [(name, len(set(part["instance_ids"])), len(part["img_paths"])) for name, part in parts.items()]
        log_table("ITCPR", ("subset", "iids", "images"), rows)
        logger.info("SynCPR: %d triplets", len(inputs.triplets))

        training = Training(args, inputs, run, resumed)
        try:
            training.train()
        except Stopped:
            logger.info("stopped; resume with the same command and --resume %s", training.directory)
            return run.exit_status
        finally:
            training.validator.close()
        progress = training.progress
        for line in closing_lines(training.directory, progress.best_step, progress.best_epoch, args):
            logger.info("%s", line)
    return 0


class Training:
    """One run, new or resumed. Building it loads data, model and, to resume, the state; `train` does the rest.

    The run directory is made last, so that data or weights that cannot be used leave nothing behind.
    """

    def __init__(self, args: TrainingFlags, inputs: TrainingInputs, run: Run, resumed: Path | None):
        self.args, self.run = args, run
        state = read_state(resumed) if resumed else None
        if args.seed is None:
            drawn = random.SystemRandom().randrange(2**31)
            args.seed = int(state["identity"]["seed"]) if state else broadcast_object(drawn)
        # What must not change when a run goes on: the order of the data and the best values follow from it.
        self.identity = {
            "seed": args.seed,
            "items": len(inputs.triplets),
            "batch_size": args.batch_size,
            "processes": run.ranks.world_size,
            **inputs.fingerprints(),
        }
        if resumed is not None and state is not None:
            require_same_run(state, self.identity, resumed / STATE)
        seed_everything(args.seed + run.ranks.rank)

        self.model = build_model(args, inputs.model_config, run.device)
        transforms = build_transforms(args.transform, inputs.model_config["image_size"], args.target_ratio)
        logger.info("%s", transforms.sentence)
        dataset = SynCPRDataset(
            args.syncpr_data_path,
            args.json_path,
            preprocess=transforms.train.pixels,
            setting=args.setting,
            records=inputs.triplets,
            on_error=args.bad_images,
        )
        self.batches = EpochBatches(
            len(dataset), args.batch_size, seed=args.seed, rank=run.ranks.rank, world_size=run.ranks.world_size
        )
        self.loader = train_loader(dataset, self.batches, usable_workers(args.num_workers), run.device)
        self.clean = BlipCaptionProcessor()
        self.optimizer = build_optimizer(self.model, args.learning_rate)
        self.precision = StepPrecision(args.amp_dtype, run.device)
        self.weights = {"loss_fda": args.loss_fda, "loss_fd": args.loss_fd, "loss_mfr": args.loss_mfr}
        self.validator = Validator(
            self.model, inputs.itcpr, transforms.test.pixels, args, run.ranks, lambda: run.interruption.requested
        )
        self.meters, self.finite = Meters(), FiniteLoss(run.device, self._not_finite)
        self.progress = Progress()
        self._measured: tuple[int, dict[str, float]] = -1, {}
        self._lost = 0

        self.parts = {
            "model": TrainedWeights(self.model),
            "optimizer": self.optimizer,
            "scaler": self.precision,
        }
        self.schedule = {"num_epochs": args.num_epochs, "learning_rate": args.learning_rate}
        rng = None
        if resumed is not None and state is not None:
            rng = restore_state(state, self.parts, run.ranks, source=resumed / STATE, meters=self.meters)
            self.progress = Progress(**state["progress"])
            logger.info("resuming at epoch %d, batch %d", self.progress.epoch, self.progress.batch)
            for name, before in state["schedule"].items():
                if before != self.schedule[name]:
                    flag = f"--{name.replace('_', '-')}"
                    logger.info(
                        "%s %s before, %s now: the remaining steps follow it", flag, before, self.schedule[name]
                    )
        # Built anew also for a resumed run, so that its remaining steps follow the flags given now.
        self.scheduler = build_scheduler(
            self.optimizer,
            args.learning_rate,
            self.batches.batches_per_epoch,
            args.num_epochs,
            done=self._steps_done,
        )
        directory = resumed
        if run.is_main:
            if directory is None:
                directory = create_run_directory(args, inputs.model_config)
            else:
                record_flags(directory, args)
            run.log.open(directory / LOG, append=resumed is not None)
            logger.info("run directory: %s", directory)
            logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
        self.directory = Path(broadcast_object(str(directory)))
        if state is not None:
            self._write_tables()  # rows after the state disappear
        self.network = run.distribute(self.model, unused=self.model.unused_parameters)
        if rng is not None:
            set_rng_state(rng)

    def train(self) -> None:
        """Train all remaining epochs.

        Raises:
            Stopped: the run was asked to stop, and its state is saved.
            FloatingPointError: the loss or the weights are no longer finite numbers.
        """
        if self.progress.epoch >= self.args.num_epochs:
            logger.info("all %d epochs are done already", self.args.num_epochs)
        while self.progress.epoch < self.args.num_epochs:
            if self.progress.pending:
                self._validate_by_step()
            self.model.train()
            for reference, target, captions, group in self._remaining_batches():
                samples = {
                    "image": reference.to(self.run.device, non_blocking=True),
                    "target": target.to(self.run.device, non_blocking=True),
                    "text_input": [self.clean(caption) for caption in captions],
                    "query_id": group.to(self.run.device, non_blocking=True),
                }
                losses = training_step(self.network, samples, self.weights, self.optimizer, self.precision)
                self.scheduler.step()  # also after a step that the gradient scaler left out
                self._after_step(losses, len(captions))
            self._finish_epoch()
            if self._all_steps_done:
                break

    @property
    def _steps_done(self) -> int:
        return self.batches.batches_per_epoch * self.progress.epoch + self.progress.batch

    @property
    def _all_steps_done(self) -> bool:
        return self.args.max_steps is not None and self._steps_done >= self.args.max_steps

    def _remaining_batches(self) -> Iterator[Any]:
        """The batches of the epoch that are not trained yet, up to `--max-steps`."""
        progress, whole = self.progress, self.batches.batches_per_epoch
        if progress.batch == whole or self._all_steps_done:
            return
        self._clock = (time.perf_counter(), self._steps_done)
        self.batches.set_position(progress.epoch, progress.batch)
        with progress_bar(whole, initial=progress.batch, unit="step", enabled=self.run.is_main) as self._bar:
            for batch in self.run.load(self.loader):
                yield batch
                if self._all_steps_done:
                    self._save_state()  # before the epoch is ended early: more steps can follow from here
                    break
        if progress.batch < whole and not self._all_steps_done:  # a signal has ended the loader's processes
            self._save_state()
            raise Stopped
        self.finite.require()
        if self._lost:
            logger.warning("%d triplets of this epoch could not be loaded and were left out", self._lost)
            self._lost = 0

    def _after_step(self, losses: dict[str, Tensor], size: int) -> None:
        """Note the losses and their `total`; then the log line, the validation, the saving and the stop that are due."""
        args, progress = self.args, self.progress
        self._lost += args.batch_size - size
        total = losses.pop("total")
        self.meters.update(losses, size)
        progress.batch += 1
        number = self._steps_done - 1  # as the tables count, from 0
        self.finite.update(total, number + 1)
        log_due = (number + 1) % args.log_every == 0
        if self.run.device.type == "cpu" or log_due:  # reading the meters waits for a GPU: not at every step
            self._bar.set_description_str(self._line())
        self._bar.update()
        if log_due:
            self.finite.require()
            began, first = self._clock
            rate = (self._steps_done - first) / (time.perf_counter() - began)
            learning_rate = self.scheduler.get_last_lr()[0]
            line = "%s step %d, lr %.3g, %.2f steps/s, %.0f%% of the time waiting for data"
            logger.info(line, self._line(), number, learning_rate, rate, 100 * self.run.waiting.share)
        if number % args.validation_step == 0 and number != 0:
            progress.pending = "step"
            self._validate_by_step()
        stop = self.run.stop_requested()
        if stop or (args.save_state_every and (number + 1) % args.save_state_every == 0):
            self._save_state()
        if stop:
            raise Stopped

    def _finish_epoch(self) -> None:
        """Note the mean losses, validate, and save weights and state."""
        args, progress, epoch = self.args, self.progress, self.progress.epoch
        rows = progress.tables["train"]
        means = self.meters.averages_of_all(self.run.device)
        if not rows or rows[-1]["epoch"] != epoch:  # else noted before an interruption of the validation below
            rows.append({"epoch": epoch, **means})
            self._write_tables()
        validated = epoch % args.validation_frequency == 0
        if validated:
            progress.best_epoch = self._validate("epoch", epoch, progress.best_epoch, BEST_BY_EPOCH)
        if args.save_last and (validated or epoch + 1 == args.num_epochs or self._all_steps_done):
            self._save_weights(LAST, epoch, "epoch")
        if progress.batch < self.batches.batches_per_epoch:  # ended by --max-steps: the saved state stays within it
            return
        progress.epoch, progress.batch = epoch + 1, 0
        self.meters = Meters()
        self._save_state()
        if self.run.stop_requested():
            raise Stopped

    def _validate_by_step(self) -> None:
        progress = self.progress
        progress.best_step = self._validate("step", self._steps_done - 1, progress.best_step, BEST_BY_STEP)

    def _validate(self, by: Literal["step", "epoch"], number: int, best: float, name: str) -> float:
        """Note a validation, and save the weights if no earlier one of its kind had such an R@1.

        Args:
            by: what the validations of this kind count.
            number: the step or epoch, from 0.
            best: best R@1 of this kind so far.
            name: of the file of the best weights.

        Returns:
            The best R@1 of this kind.
        """
        self.finite.require()
        if self._measured[0] != self._steps_done:  # the last step of an epoch can be due for both kinds
            try:
                self._measured = self._steps_done, self.validator.measure()
            except ExtractionStopped:
                self._save_state()
                raise Stopped from None
        measured = self._measured[1]
        logger.info("ITCPR validation, %s %d:\n%s", by, number, json.dumps(measured, indent=4))
        if by == "step":
            self.progress.pending = ""
        self.progress.tables[by].append({by: number, **measured})
        self._write_tables()
        if measured["recall_at1"] <= best:
            return best
        if self.args.save_best:
            self._save_weights(name, number, by)
        return measured["recall_at1"]

    def _write_tables(self) -> None:
        if self.run.is_main:
            for name, file in TABLES.items():
                write_table(self.directory / file, self.progress.tables[name])

    def _save_weights(self, name: str, number: int, mode: Literal["step", "epoch"]) -> None:
        if self.args.save_training and self.run.is_main:
            save_model(name, number, self.model, self.directory, mode=mode)
            logger.info("saved %s", self.directory / WEIGHTS / f"{name}.pt")

    def _save_state(self) -> None:
        """Write what `--resume` needs to go on to the bit; every process must call it."""
        self.finite.require()
        require_finite_weights(self.model, "the last saved state stays")
        if self.run.is_main:
            save_frozen(self.model, self.directory)
        save_state(
            self.directory / STATE,
            self.run.ranks,
            self.parts,
            meters=self.meters,
            format=FORMAT,
            identity=self.identity,
            schedule=self.schedule,
            progress=asdict(self.progress),
        )

    def _not_finite(self, step: int) -> str:
        resume = f"--resume {self.directory} goes back to the last saved state"
        return (
            f"the loss is not a finite number at step {step - 1} (learning rate {self.scheduler.get_last_lr()[0]:.2e}); "
            f"{resume if (self.directory / STATE).is_file() else 'no state is saved'}; a lower --learning-rate, or "
            "--amp-dtype bf16 or fp32, usually helps"
        )

    def _line(self) -> str:
        means = "".join(f"{name}: {value:.3f}, " for name, value in self.meters.averages().items())
        return f"[{self.progress.epoch}/{self.args.num_epochs}] {means}"


def training_step(
    network: nn.Module,
    samples: Mapping[str, Any],
    weights: Mapping[str, float],
    optimizer: Optimizer,
    precision: StepPrecision,
) -> dict[str, Tensor]:
    """One step of the optimizer.

    Args:
        network: the model.
        samples: what it takes, tensors on its device.
        weights: name of a loss -> its weight in the total; 1 where there is none.
        optimizer: of the trained parameters.
        precision: of the run.

    Returns:
        The losses, and their weighted sum `total`.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast():
        losses: dict[str, Tensor] = network(samples)
        total = torch.stack([loss * weights.get(name, 1.0) for name, loss in losses.items()]).sum()
    precision.backward_and_step(total, optimizer)
    return {**losses, "total": total.detach()}


def build_model(args: TrainingFlags, config: Mapping[str, Any], device: torch.device) -> Blip2FAFACPR:
    """The model of a run, in training mode on its device.

    Raises:
        InputError: a file of start weights cannot be used.
    """
    model = Blip2FAFACPR.from_config(config)
    if args.resume_path:
        loaded = load_checkpoint(model, args.resume_path, trust=args.trust_checkpoint)
        missing, unexpected = len(loaded.missing_keys), len(loaded.unexpected_keys)
        logger.info("%s loaded: %d keys missing, %d unexpected", args.resume_path, missing, unexpected)
    model = place(model, device)
    model.fda_k, model.fda_alpha, model.use_fda_alpha = args.fda_k, args.fda_alpha, args.use_fda_alpha
    model.dispersion_loss.margin = args.fd_margin
    model.autocast_dtype = _AUTOCAST[args.amp_dtype]
    model.gather = args.gather
    if args.compile:
        model.compile_vit()
    for name, value in (("fda_k", args.fda_k), ("fda_alpha", args.fda_alpha), ("fd_margin", args.fd_margin)):
        logger.info("%s = %s", name, value)
    trained, frozen = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad is kind)
        for kind in (True, False)
    )
    logger.info("%.1fM parameters are trained, %.1fM are frozen", trained / 1e6, frozen / 1e6)
    return model.train()
