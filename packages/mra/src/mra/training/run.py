"""A training run, from its configuration to its checkpoints: new or resumed, in one process or in several."""

import argparse
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mra.config import CONFIG_NAME, evaluation_files, with_overrides, write_config
from mra.data import RetrievalTestDataset
from mra.data.loaders import training_dataset, training_loader
from mra.model import Retrieval
from mra.model.official_layout import load_pretrained
from mra.preflight import LAST_NAME, check_training_size
from mra.retrieval import EvaluationStopped, evaluate_split
from mra.solver import create_optimizer
from mra.text import build_tokenizer
from mra.training.loop import Epoch, train_epoch
from mra.training.meters import Meters
from mra.training.outputs import BEST_NAME, epoch_table, log_line, save_weights, write_log
from mra.training.state import VERSION, Progress, Resumed, read_state
from mra.training.step import Schedule, Step
from tbps_common.errors import CheckpointError
from tbps_common.run.batches import replaced_items
from tbps_common.run.checkpoint import load_state_dict_strictly, save_checkpoint
from tbps_common.run.distributed import Ranks, barrier, gather_objects
from tbps_common.run.logs import RunLog
from tbps_common.run.randomness import all_rng_states, rng_state, seed_everything, set_rng_state
from tbps_common.run.stop import AgreedStop, Interruption

logger = logging.getLogger("mra.training")


class TrainingRun:
    """One run. Building it loads the data, the model and the checkpoint; `train` does the rest.

    The output folder is made last, so that data or weights that cannot be used leave nothing behind.

    Args:
        config: configuration of the task, without the flags.
        args: flags of `Retrieval.py`.
        device: where this process computes.
        ranks: place of this process among all.
        interruption: entered already, so that loader processes inherit its handlers.
        log: log lines, written to the output folder as soon as there is one.

    Raises:
        InputError: data, weights or checkpoint cannot be used.
        OSError: the output folder cannot be written.
    """

    def __init__(
        self,
        config: dict[str, Any],
        args: argparse.Namespace,
        device: torch.device,
        ranks: Ranks,
        interruption: Interruption,
        log: RunLog,
    ):
        self.args, self.device, self.ranks = args, device, ranks
        self.config = with_overrides(config, args)
        self.folder = Path(args.output_dir)
        self.interruption = interruption
        self._stop_requested = AgreedStop(interruption, ranks)

        seed_everything(args.seed + ranks.rank)
        tokenizer = build_tokenizer(self.config["text_encoder"])
        dataset = training_dataset(self.config)
        self._replaced = replaced_items(args.bad_images, len(dataset))
        check_training_size(len(dataset), self.config["batch_size_train"], ranks.world_size)
        self.loader, self.batches = training_loader(
            dataset,
            tokenizer,
            self.config,
            seed=args.seed,
            ranks=ranks,
            num_workers=args.num_workers,
            pin_memory=device.type == "cuda",
            replaced=self._replaced,
        )
        self._image_path = dataset.image_path
        self.tokenizer = tokenizer
        self.evaluated = RetrievalTestDataset(evaluation_files(self.config)[args.select], self.config)

        resumed = read_state(self.last, self.config, args.seed, ranks) if args.resume else None
        self.model = self._build_model(resumed is not None).to(device)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        logger.info("number of trainable parameters: %d", trainable)
        optimizer = create_optimizer(self.model, self.config["optimizer"])
        per_epoch = math.ceil(len(dataset) / (self.config["batch_size_train"] * ranks.world_size))
        schedule = Schedule(optimizer, self.config["schedular"], per_epoch)
        self.step = Step(self.model, optimizer, schedule, device, self.config.get("region", 0))
        self.meters = Meters(self.step.meter_names, device)
        self.progress = Progress()
        if resumed is not None:
            self._restore(resumed)
        self.step.network = self._distribute()
        self._open_folder(config, log)
        if resumed is not None and resumed.rng is not None:
            set_rng_state(resumed.rng)

    @property
    def last(self) -> Path:
        return self.folder / LAST_NAME

    def train(self) -> int:
        """Train all remaining epochs.

        Returns:
            Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop.

        Raises:
            FloatingPointError: the loss is no longer a finite number.
        """
        epochs = self.config["schedular"]["epochs"]
        if self.progress.epoch >= epochs:
            logger.info("all %d epochs are done already", epochs)
        while self.progress.epoch < epochs:
            if not (self._train_epoch() and self._finish_epoch(epochs)):
                return self._stop()
        if self.ranks.is_main:
            write_log(self.folder, self.progress.log, self.progress.best_epoch)
        logger.info("best R1: %.3f in epoch %d", self.progress.best_r1, self.progress.best_epoch)
        return 0

    def _train_epoch(self) -> bool:
        """Train what is left of the epoch; False if the run was asked to stop."""
        progress = self.progress
        epoch = Epoch(progress.epoch, self.batches.batches_per_epoch, progress.batch)
        if not progress.batch:
            self.meters = Meters(self.step.meter_names, self.device)
        if not progress.trained:
            self.model.train()
            self.batches.set_position(epoch.number, epoch.done)
            completed = train_epoch(
                self.loader,
                self.step,
                self.meters,
                epoch,
                log_every=self.args.log_every,
                save_every=self.args.save_every,
                save=lambda: self._save_last(epoch.done),
                stop_requested=self._stop_requested,
                last_good=self._last_good,
            )
            if self._replaced is not None and (sentence := self._replaced.report(self._image_path)):
                logger.warning("%s", sentence)
            progress.trained = completed and epoch.done == epoch.batches
            self._save_last(epoch.done)
            return completed
        return True

    def _finish_epoch(self, epochs: int) -> bool:
        progress = self.progress
        averages = self.meters.averages()
        rng = rng_state()  # the evaluation must not change what the next epoch draws
        try:
            metrics = evaluate_split(
                self.model,
                self.evaluated,
                self.tokenizer,
                self.config,
                device=self.device,
                ranks=self.ranks,
                score_world=self.args.score_world,
                num_workers=self.args.num_workers,
                amp=self.args.amp_eval,
                stop=self._stop_requested,
            ).itm.metrics
        except EvaluationStopped:
            return False
        set_rng_state(rng)
        progress.log.append(log_line(progress.epoch, metrics, averages))
        if self.ranks.is_main:
            print(epoch_table(progress.log), flush=True)
            write_log(self.folder, progress.log)
        if metrics["R1"] > progress.best_r1:
            progress.best_r1, progress.best_epoch = metrics["R1"], progress.epoch
            if "train_file_regions" not in self.config:
                self._save_weights(BEST_NAME)
        progress.epoch += 1
        if "train_file_regions" in self.config and progress.epoch == epochs:
            self._save_weights(f"checkpoint_{epochs - 1}.pth")
        progress.batch, progress.trained = 0, False
        self._save_last(0)
        barrier()
        return not self._stop_requested() or progress.epoch == epochs

    def _stop(self) -> int:
        if self.args.save_every:
            logger.info("stopped in epoch %d; go on with the same command and --resume", self.progress.epoch)
        else:
            logger.info("stopped in epoch %d; nothing was saved (--save_every 0)", self.progress.epoch)
        return self.interruption.exit_status

    def _build_model(self, resumed: bool) -> Retrieval:
        load = not resumed and bool(self.config.get("load_pretrained"))
        model = Retrieval(self.config, init_backbones=not (resumed or load))
        if load:
            load_pretrained(model, self.args.checkpoint, self.config, trust=self.args.trust_checkpoint)
        return model

    def _restore(self, resumed: Resumed) -> None:
        load_state_dict_strictly(self.model, resumed.model, source=str(self.last))
        try:
            self.step.optimizer.load_state_dict(resumed.optimizer)
            if self.step.scaler is not None and resumed.scaler:
                self.step.scaler.load_state_dict(resumed.scaler)
            if resumed.progress.batch:
                self.meters.load_state_dict(resumed.meters)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the optimizer state of {self.last} does not fit this run ({error}): resume with the configuration it "
                "was started with"
            ) from error
        self.progress = resumed.progress
        # After the optimizer's state, which brings back the rates of the moment.
        self.step.schedule.go_to(resumed.progress.steps)

    def _distribute(self) -> nn.Module:
        if not self.ranks.distributed:
            return self.model
        return nn.parallel.DistributedDataParallel(
            self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def _open_folder(self, config: dict[str, Any], log: RunLog) -> None:
        if self.ranks.is_main:
            if self.last.is_file() and not self.args.resume:
                logger.warning(
                    "%s is the state of an earlier run, which this run replaces; --resume would go on with it",
                    self.last,
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            log.open(self.folder / "run.log", append=self.args.resume)
            write_config(self.folder / CONFIG_NAME, config)
        barrier()

    def _save_last(self, batch: int) -> None:
        """Write `last.pth`; every process must call it."""
        self.progress.batch = batch
        self.progress.steps = self.step.schedule.done
        if not self.args.save_every:
            return
        rng, meters = all_rng_states(self.ranks), gather_objects(self.meters.state_dict())
        if self.ranks.is_main:
            content = {
                "version": VERSION,
                "progress": dataclasses.asdict(self.progress),
                "model": dict(self.model.state_dict()),
                "config": self.config,
                "seed": self.args.seed,
                "optimizer": self.step.optimizer.state_dict(),
                "scaler": self.step.scaler.state_dict() if self.step.scaler is not None else {},
                "meters": meters,
                "rng": rng,
            }
            save_checkpoint(content, self.last)

    def _save_weights(self, name: str) -> None:
        if self.ranks.is_main:
            save_weights(self.folder / name, self.model.state_dict(), self.config)
            logger.info("saved %s", self.folder / name)

    def _last_good(self) -> str:
        return f"the last good state is {self.last}" if self.last.is_file() else "no state has been written yet"
