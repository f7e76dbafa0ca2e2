"""A training run, from its flags to its run directory: new or resumed, in one process or in several."""

import argparse
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fafa.data import SynCPRDataset
from fafa.data.collate import train_loader
from fafa.extraction import ExtractionStopped, usable_workers
from fafa.optim import build_optimizer, build_scheduler
from fafa.preflight import RunInputs
from fafa.processors import BlipCaptionProcessor
from fafa.training.loop import Step
from fafa.training.meters import Meters
from fafa.training.precision import StepPrecision
from fafa.training.records import Records
from fafa.training.run_directory import closing_lines
from fafa.training.setup import build_model, distribute, open_directory
from fafa.training.state import (
    Progress,
    RunIdentity,
    SavedState,
    read_state,
    restore_weights,
    save_state,
)
from fafa.training.validation import Validator
from fafa.transforms import build_transforms
from tbps_common.run.batches import EpochBatches
from tbps_common.run.distributed import Ranks, broadcast_object, gather_objects
from tbps_common.run.logs import RunLog
from tbps_common.run.randomness import all_rng_states, seed_everything, set_rng_state
from tbps_common.run.stop import AgreedStop, FiniteLoss, Interruption

logger = logging.getLogger("fafa.train")


class TrainingRun:
    """One run. Building it loads data, model and, to resume, the state; `train` does the rest.

    The run directory is made last, so that data or weights that cannot be used leave nothing behind.

    Args:
        args: flags, checked by `check_training_flags`; `seed` is filled in.
        inputs: annotations and model configuration.
        device: where this process computes.
        ranks: place of this process among all.
        log: log lines, written to the run directory as soon as there is one.
        resumed: run directory to go on with.

    Raises:
        InputError: data, weights or state cannot be used.
        OSError: the run directory cannot be written.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        inputs: RunInputs,
        device: torch.device,
        ranks: Ranks,
        log: RunLog,
        resumed: Path | None = None,
    ):
        self.args, self.device, self.ranks = args, device, ranks
        self.interruption = Interruption()
        self._agreed_stop = AgreedStop(self.interruption, ranks)
        state = read_state(resumed) if resumed else None
        if args.seed is None:
            args.seed = state.identity.seed if state else broadcast_object(random.SystemRandom().randrange(2**31))
        self.identity = RunIdentity(args.seed, len(inputs.records), args.batch_size, args.num_epochs, ranks.world_size)
        if state is not None:
            state.require(self.identity)
        seed_everything(args.seed + ranks.rank)

        self.model = build_model(args, inputs.model_config, device)
        transforms = build_transforms(args.transform, inputs.model_config["image_size"], args.target_ratio)
        logger.info("%s", transforms.sentence)
        dataset = SynCPRDataset(
            args.syncpr_data_path,
            args.json_path,
            preprocess=transforms.train,
            setting=args.setting,
            records=inputs.records,
            on_error=args.bad_images,
        )
        self.batches = EpochBatches(
            len(dataset), args.batch_size, seed=args.seed, rank=ranks.rank, world_size=ranks.world_size
        )
        self.loader = train_loader(dataset, self.batches, usable_workers(args.num_workers), device)
        self.optimizer = build_optimizer(self.model, args.learning_rate)
        self.scheduler = build_scheduler(
            self.optimizer, args.learning_rate, self.batches.batches_per_epoch, args.num_epochs
        )
        self.precision = StepPrecision(args.amp_dtype, device)
        clean = BlipCaptionProcessor()
        self.validate = Validator(
            self.model,
            inputs.itcpr,
            transforms.test,
            clean=clean,
            device=device,
            ranks=ranks,
            batch_size=args.eval_batch_size,
            num_workers=args.eval_num_workers,
            cache_bytes=int(args.eval_cache_gb * 2**30),
            cache_folder=Path(args.eval_cache_dir) if args.eval_cache_dir else None,
            stop_requested=lambda: self.interruption.requested,
        )
        self.progress, self.meters = Progress(), Meters()
        rng = self._restore(state) if state is not None else None
        self.directory = open_directory(args, inputs.model_config, ranks, log, resumed)
        self.records = Records(self.directory, self.progress, self.model, args, ranks)
        if state is not None:
            self.records.rewrite()
        self.step = Step(
            distribute(self.model, device, ranks),
            self.optimizer,
            self.scheduler,
            self.precision,
            device,
            clean,
            {"loss_fda": args.loss_fda, "loss_fd": args.loss_fd, "loss_mfr": args.loss_mfr},
        )
        self.finite = FiniteLoss(device)
        self._dropped = 0
        self._clock = (0.0, 0)
        self._measured: tuple[int, dict[str, float]] | None = None
        if rng is not None:
            set_rng_state(rng)

    def train(self) -> int:
        """Train all remaining epochs.

        Returns:
            Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite numbers.
        """
        if self.progress.epoch >= self.args.num_epochs:
            logger.info("all %d epochs are done already", self.args.num_epochs)
        try:
            with self.interruption:
                while self.progress.epoch < self.args.num_epochs:
                    if not self._train_epoch():
                        logger.info("stopped; go on with the same command and --resume %s", self.directory)
                        return self.interruption.exit_status
                    if self._all_steps_done():
                        break
        finally:
            self.validate.close()
        for line in closing_lines(self.directory, self.progress.best_step, self.progress.best_epoch, self.args):
            logger.info("%s", line)
        return 0

    @property
    def _steps_done(self) -> int:
        return self.batches.batches_per_epoch * self.progress.epoch + self.progress.batch

    def _all_steps_done(self) -> bool:
        return self.args.max_steps is not None and self._steps_done >= self.args.max_steps

    def _train_epoch(self) -> bool:
        """Train one epoch, or what is left of it; False if the run was asked to stop and has saved its state."""
        if self.progress.pending == "step" and not self._validate_by_step():
            return False
        if self.progress.batch < self.batches.batches_per_epoch and not self._all_steps_done():
            if not self._train_batches():
                return False
        return self._finish_epoch()

    def _train_batches(self) -> bool:
        """Train the batches left of the epoch; False if the run was asked to stop and has saved its state."""
        self.model.train()
        self._clock = (time.perf_counter(), self._steps_done)
        with self._progress_bar() as bar:
            for batch in self._load():
                if not self._train_batch(batch, bar):
                    return False
                if self._all_steps_done():
                    self._save_state()  # before the epoch is ended early: more steps can follow from here
                    break
        self._require_finite()
        if self._dropped:
            logger.warning("%d triplets of this epoch could not be loaded and were left out", self._dropped)
            self._dropped = 0
        return self.progress.batch == self.batches.batches_per_epoch or self._all_steps_done()

    def _train_batch(self, batch: Any, bar: Any) -> bool:
        """One step and what is due after it; False if the run was asked to stop and has saved its state."""
        args = self.args
        losses, total = self.step(batch)
        size = len(batch[3])
        self._dropped += args.batch_size - size
        self.meters.update(losses, size)
        self.progress.batch += 1
        number = self._steps_done - 1  # as the tables count, from 0
        self.finite.update(total, number + 1)
        log_due = (number + 1) % args.log_every == 0
        if self.device.type == "cpu" or log_due:
            # On a GPU these wait for the device, so they are not made at every step.
            self._require_finite()
            bar.set_description_str(self._line())
        bar.update()
        if log_due:
            began, first = self._clock
            rate = (self._steps_done - first) / (time.perf_counter() - began)
            learning_rate = self.scheduler.get_last_lr()[0]
            logger.info("%s step %d, lr %.3g, %.2f steps/s", self._line(), number, learning_rate, rate)
        if number % args.validation_step == 0 and number != 0:
            self.progress.pending = "step"
            if not self._validate_by_step():
                return False
        stop = self._agreed_stop()
        if stop or (args.save_state_every and (number + 1) % args.save_state_every == 0):
            self._save_state()
        return not stop

    def _load(self) -> Iterator[Any]:
        """The batches of the epoch that are not trained yet."""
        self.batches.set_position(self.progress.epoch, self.progress.batch)
        try:
            yield from self.loader
        except RuntimeError:
            # A SIGTERM to the whole process group also ends the loader's processes. What was trained can be saved.
            if not self.interruption.requested or self.ranks.distributed:
                raise
            self._save_state()

    def _finish_epoch(self) -> bool:
        """Note losses, validate and save; False if the run was asked to stop and has saved its state."""
        progress, args = self.progress, self.args
        epoch = progress.epoch
        self.records.add_losses(epoch, self.meters.means_of_all(self.ranks, self.device))
        validated = epoch % args.validation_frequency == 0
        if validated:
            measured = self._measure()
            if measured is None:
                return False
            self.records.add_validation("epoch", epoch, measured)
        if validated or epoch + 1 == args.num_epochs or self._all_steps_done():
            self.records.save_last(epoch)
        if progress.batch < self.batches.batches_per_epoch:  # ended by --max-steps: the saved state stays within it
            return True
        progress.epoch, progress.batch = epoch + 1, 0
        self.meters = Meters()
        self._save_state()
        return not self._agreed_stop()

    def _validate_by_step(self) -> bool:
        measured = self._measure()
        if measured is None:
            return False
        self.progress.pending = ""
        self.records.add_validation("step", self._steps_done - 1, measured)
        return True

    def _measure(self) -> dict[str, float] | None:
        """Recalls and mAP; None if the run was asked to stop meanwhile and has saved its state."""
        self._require_finite()
        if self._measured is None or self._measured[0] != self._steps_done:
            try:
                self._measured = (self._steps_done, self.validate())
            except ExtractionStopped:
                self._save_state()
                return None
        return self._measured[1]  # the last step of an epoch can be due for a validation of both kinds

    def _save_state(self) -> None:
        """Write the state; every process must call it."""
        self._require_finite()
        rng = all_rng_states(self.ranks)
        meters = gather_objects(self.meters.state_dict())
        if self.ranks.is_main:
            save_state(
                self.directory,
                self.model,
                identity=self.identity,
                progress=self.progress,
                rng=rng,
                meters=meters,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                scaler=self.precision.state_dict(),
            )

    def _require_finite(self) -> None:
        iteration = self.finite.first_bad_iteration()
        if iteration:
            saved = self.directory / "training_state" / "last.pt"
            good = (
                f"--resume {self.directory} goes back to the last saved state"
                if saved.is_file()
                else "no state is saved"
            )
            raise FloatingPointError(
                f"the loss is not a finite number at step {iteration - 1} (learning rate "
                f"{self.scheduler.get_last_lr()[0]:.2e}); {good}; a lower --learning-rate, or --amp-dtype bf16 or fp32, "
                "usually helps"
            )

    def _line(self) -> str:
        means = "".join(f"{name}: {value:.3f}, " for name, value in self.meters.means().items())
        return f"[{self.progress.epoch}/{self.args.num_epochs}] {means}"

    def _progress_bar(self) -> Any:
        from tqdm import tqdm

        # disable=None: no bar where stderr is not a terminal.
        return tqdm(
            total=self.batches.batches_per_epoch,
            initial=self.progress.batch,
            ncols=150,
            leave=False,
            disable=None if self.ranks.is_main else True,
        )

    def _restore(self, state: SavedState) -> dict[str, Any]:
        restore_weights(self.model, state)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        self.precision.load_state_dict(state.scaler)
        self.meters.load_state_dict(state.meters[self.ranks.rank], self.device)
        self.progress = state.progress
        logger.info("resuming at epoch %d, batch %d", self.progress.epoch, self.progress.batch)
        return state.rng[self.ranks.rank]
