"""A training run, from its flags to its run directory: new or resumed, in one process or in several."""

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmlfa.checkpoint import Checkpointer
from cmlfa.config import CONFIG_NAME, changed_flags, load_train_configs, save_train_configs
from cmlfa.datasets import build_dataloader
from cmlfa.evaluation import EvaluationStopped, evaluate, metrics_table
from cmlfa.model import ClipGeometry, build_model, clip_geometry
from cmlfa.model.cmlfa import resolve_precision
from cmlfa.solver import build_lr_scheduler, build_optimizer
from cmlfa.training.loop import Epoch, Step, train_epoch
from cmlfa.training.meters import Meters
from cmlfa.training.precision import StepPrecision
from cmlfa.training.progress import Progress, read_progress
from cmlfa.training.run_directory import (
    BEST_NAME,
    LAST_NAME,
    create_run_directory,
    own_run_directory,
    remove_partial_checkpoints,
    resume_checkpoint,
)
from tbps_common.run.batches import ReplacingItems
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file
from tbps_common.run.distributed import Ranks, broadcast_object
from tbps_common.run.logs import RunLog
from tbps_common.run.randomness import all_rng_states, rng_state, seed_everything, set_rng_state
from tbps_common.run.stop import AgreedStop, Interruption

logger = logging.getLogger("IRRA.train")


class TrainingRun:
    """One run. Building it loads the data, the model and, to resume, the checkpoint; `train` does the rest.

    The run directory is made last, so that flags, data or weights that cannot be used leave nothing behind.

    Args:
        args: flags of `get_args`, checked by `check_training_flags`.
        device: where this process computes.
        ranks: place of this process among all.
        log: log lines, written to the run directory as soon as there is one.

    Raises:
        InputError: data, weights or checkpoint cannot be used.
        OSError: the run directory cannot be written.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, ranks: Ranks, log: RunLog):
        self.args, self.device, self.ranks = args, device, ranks
        self.interruption = Interruption()
        self._stop_requested = AgreedStop(self.interruption, ranks)

        source = self._checkpoint_to_resume()
        seed_everything(args.seed + ranks.rank)
        self.loader, self.image_loader, self.text_loader, num_classes = build_dataloader(args)
        self.model = build_model(args, num_classes, geometry=_stored_geometry(source, args)).to(device)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info("Total params: %.1fM", parameters / 1e6)
        self.optimizer = build_optimizer(args, self.model)
        self.scheduler = build_lr_scheduler(args, self.optimizer)
        self.precision = StepPrecision(resolve_precision(args.precision, device.type), device)
        self.checkpointer = Checkpointer(self.model, self.optimizer, self.scheduler, save_to_disk=ranks.is_main)
        self.meters = Meters()
        self._epoch = Epoch(0, args.log_period, base_lr=0.0)
        self._loader_stopped = False
        self.progress, rng = self._resume(source) if source else (Progress(), None)
        self.directory = self._open_directory(source, log)
        self.network = self._distribute()
        if rng is not None:
            set_rng_state(rng)

    def train(self) -> int:
        """Train all remaining epochs.

        Returns:
            Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite numbers.
        """
        first = self.progress.epoch + 1
        if first > self.args.num_epoch:
            logger.info("all %d epochs are done already", self.args.num_epoch)
        writer = _tensorboard(self.directory, first) if self.ranks.is_main else None
        try:
            with self.interruption:
                for epoch in range(first, self.args.num_epoch + 1):
                    if not (self._train_epoch(epoch) and self._finish_epoch(epoch, writer)):
                        return self._stop(epoch)
        finally:
            if writer is not None:
                writer.close()
        self._conclude()
        return 0

    def _train_epoch(self, number: int) -> bool:
        """Train one epoch, or what is left of it; False if the run was asked to stop and has saved its state."""
        unfinished, self.progress.unfinished = self.progress.unfinished, None
        self._set_epoch(number)
        self.meters = Meters()
        self._epoch = epoch = Epoch(number, self.args.log_period, base_lr=self.optimizer.param_groups[0]["lr"])
        now = rng_state()
        if unfinished is None:
            epoch_rng = all_rng_states(self.ranks)
        else:
            epoch.done = unfinished.iteration
            self.meters.load_state_dict(unfinished.meters, self.device)
            if unfinished.trained:
                return True
            # The same order and the same worker seeds as before; batches trained already are loaded and passed over.
            epoch_rng = unfinished.epoch_rng
            set_rng_state(epoch_rng[self.ranks.rank])
            logger.info("passing over the %d batches of epoch %d that are trained already", epoch.done, number)
        self._loader_stopped = False
        self.network.train()
        completed = train_epoch(
            self._batches(),
            len(self.loader),
            Step(self.network, self.optimizer, self.precision, self.device),
            self.meters,
            epoch,
            passed_over_all=lambda: set_rng_state(now),
            stop_requested=self._stop_requested,
            last_good=self._last_good,
            progress=self._progress_bar,
        )
        self._report_replaced()
        if completed and not self._loader_stopped:
            return True
        self._save_unfinished(epoch_rng, all_rng_states(self.ranks), trained=False)
        return False

    def _report_replaced(self) -> None:
        items = self.loader.dataset
        if isinstance(items, ReplacingItems):
            sentence = items.replaced.report(lambda index: items.dataset.dataset[index][2])
            if sentence is not None:
                logger.warning("%s", sentence)

    def _finish_epoch(self, epoch: int, writer: Any) -> bool:
        if writer is not None:
            writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], epoch)
            writer.add_scalar("temperature", self.args.temperature, epoch)
            for name, value in self.meters.averages().items():
                writer.add_scalar(name, value, epoch)
        rng = all_rng_states(self.ranks)
        metrics: dict[str, float] | None = None
        if epoch % self.args.eval_period == 0:
            metrics = broadcast_object(self._evaluate(epoch) if self.ranks.is_main else None)
            if metrics is None:
                self._save_unfinished(rng, rng, trained=True)
                return False
        self.scheduler.step()
        self.progress.epoch = epoch
        if metrics is not None:
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(f"eval/{name}", value, epoch)
            if metrics["R1"] > self.progress.best_top1:
                self.progress.best_top1, self.progress.best_epoch = metrics["R1"], epoch
                self._save(BEST_NAME, epoch=epoch, iteration=0)
        if writer is not None:
            writer.flush()
        self._save(LAST_NAME, epoch=epoch, iteration=0, rng=all_rng_states(self.ranks), **self._score())
        return not self._stop_requested()

    def _evaluate(self, epoch: int) -> dict[str, float] | None:
        """Metrics of text-to-image retrieval, or None if the run was asked to stop meanwhile."""
        split = "val" if self.args.val_dataset == "val" else "test"
        try:
            results = evaluate(
                self.model,
                self.image_loader,
                self.text_loader,
                stop_requested=lambda: self.interruption.requested,
            )
        except EvaluationStopped:
            return None
        # The batch size is part of the result: with --lfa_attention batch the features depend on it.
        logger.info(
            "Validation Results - Epoch: %d (%s split, batch size %d, lfa_attention %s)",
            epoch,
            split,
            self.args.batch_size,
            self.args.lfa_attention,
        )
        logging.getLogger("IRRA.eval").info("\n%s", metrics_table(results))
        return dict(results["t2i"].metrics)

    def _stop(self, epoch: int) -> int:
        path = self.directory / f"{LAST_NAME}.pth"
        logger.info("stopped in epoch %d; go on with --resume --resume_ckpt_file %s", epoch, path)
        return self.interruption.exit_status

    def _conclude(self) -> None:
        if self.progress.best_epoch:
            logger.info("best R1: %s at epoch %d", self.progress.best_top1, self.progress.best_epoch)
        else:
            logger.info(
                "no epoch was evaluated with an R1 above 0, so there is no %s.pth; the last weights are in %s",
                BEST_NAME,
                self.directory / f"{LAST_NAME}.pth",
            )
        logger.info("test it with: python test.py --config_file '%s'", self.directory / CONFIG_NAME)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            yield from self.loader
        except RuntimeError:
            # A SIGTERM to the whole process group also ends the loader's processes. What was trained can be saved.
            if not self.interruption.requested or self.ranks.distributed:
                raise
            self._loader_stopped = True

    def _progress_bar(self, batches: Iterable[Any]) -> Iterable[Any]:
        from tqdm import tqdm

        # disable=None: no bar where stderr is not a terminal.
        disable = None if self.ranks.is_main else True
        label = f"epoch {self._epoch.number}/{self.args.num_epoch}"
        return tqdm(batches, desc=label, total=len(self.loader), unit="batch", leave=False, disable=disable)

    def _set_epoch(self, epoch: int) -> None:
        for sampler in (self.loader.sampler, self.loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def _save_unfinished(self, epoch_rng: list[Any], rng: list[Any], *, trained: bool) -> None:
        """`last.pth` within an epoch: `iteration`, 0 in all other files, tells how many batches it has had."""
        self._save(
            LAST_NAME,
            epoch=self._epoch.number,
            iteration=self._epoch.done,
            trained=trained,
            rng=rng,
            epoch_rng=epoch_rng,
            meters=self.meters.state_dict(),
            **self._score(),
        )

    def _score(self) -> dict[str, Any]:
        scaler = self.precision.state_dict()
        return {
            "best_top1": self.progress.best_top1,
            "best_epoch": self.progress.best_epoch,
            **({"scaler": scaler} if scaler else {}),
        }

    def _save(self, name: str, **extra: Any) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise FloatingPointError(
                f"the weights are no longer finite numbers at the end of epoch {extra['epoch']} (base learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.2e}), so they are not saved; {self._last_good()}; a lower --lr, "
                "or --precision fp32 or amp, usually helps"
            )
        self.checkpointer.save(name, num_epoch=self.args.num_epoch, **extra)

    def _last_good(self) -> str:
        path = self.directory / f"{LAST_NAME}.pth"
        return f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint has been written yet"

    def _checkpoint_to_resume(self) -> Path | None:
        if not self.args.resume:
            return None
        # Files may appear while the processes start: the main process decides for all.
        return broadcast_object(resume_checkpoint(self.args) if self.ranks.is_main else None)

    def _resume(self, source: Path) -> tuple[Progress, dict[str, Any] | None]:
        rest = self.checkpointer.resume(source, trust=self.args.trust_checkpoint)
        own = own_run_directory(source)
        if "best_top1" not in rest and own is not None and source.stem != LAST_NAME:
            # best.pth keeps to the released layout, which has no score; last.pth of the same run knows it.
            beside = load_checkpoint_file(own / f"{LAST_NAME}.pth", trust=self.args.trust_checkpoint, mmap=True)
            rest |= {name: beside[name] for name in ("best_top1", "best_epoch") if name in beside}
        self.precision.load_state_dict(rest.get("scaler", {}))
        return read_progress(rest, source, self.ranks)

    def _open_directory(self, source: Path | None, log: RunLog) -> Path:
        """Make the run directory or, resuming, go on in the one the checkpoint lies in; write `configs.yaml`."""
        own = own_run_directory(source) if source else None
        directory = None
        if self.ranks.is_main:
            if own is not None:
                directory = own
                remove_partial_checkpoints(own)
                _report_changed_flags(own / CONFIG_NAME, self.args)
            else:
                directory = create_run_directory(self.args)
            self.args.output_dir = str(directory)
            log.open(directory / "train_log.txt", append=own is not None)
            save_train_configs(directory, self.args)
            logger.info("run directory: %s", directory)
            logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(self.args).items())))
        directory = broadcast_object(directory)
        assert directory is not None
        self.checkpointer.save_dir = str(directory)
        return directory

    def _distribute(self) -> nn.Module:
        if not self.ranks.distributed:
            return self.model
        return nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            # `safl.pos_embeding` never gets a gradient, and the reducer would wait for it at the second step.
            find_unused_parameters=True,
        )


def _stored_geometry(source: Path | None, args: argparse.Namespace) -> ClipGeometry | None:
    """Sizes of the CLIP towers in the checkpoint to resume from: the start weights are not needed again."""
    if source is None:
        return None
    state, _ = find_state_dict(load_checkpoint_file(source, trust=args.trust_checkpoint, mmap=True), source=str(source))
    return clip_geometry(state, str(source), prefix="base_model.")


def _report_changed_flags(path: Path, args: argparse.Namespace) -> None:
    for name, (before, now) in changed_flags(load_train_configs(path), vars(args)).items():
        logger.warning("--%s was %s when the run began, and is %s now", name, before, now)


def _tensorboard(directory: Path, first_epoch: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Points of epochs that a killed run had begun are dropped.
    return SummaryWriter(str(directory), purge_step=first_epoch)
