"""Pre-training and fine-tuning (paper section 3): what is built, the loop over epochs and batches, and what is saved.

An epoch is trained, then evaluated on the split of `--select`; its line is added to `log.txt`, and its weights are kept if
its R@1 is the best so far. `last.pth` holds all that a run needs to go on exactly where it was.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable
from torch import Tensor, nn

from mra.config import CONFIG_NAME, evaluation_files, with_overrides, write_config
from mra.data.datasets import RetrievalTestDataset
from mra.data.loader import training_dataset, training_loader
from mra.evaluate import EvaluationStopped, evaluate_split
from mra.model.network import Retrieval
from mra.optimizer import Schedule, create_optimizer
from mra.preflight import STATE_NAME, Annotation, check_training_size
from mra.retrieval.metrics import METRICS
from mra.text.tokens import build_tokenizer
from tbps_common.errors import CheckpointError
from tbps_common.files import write_text
from tbps_common.run.batches import replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_common.run.distributed import Ranks, barrier
from tbps_common.run.meters import Meters
from tbps_common.run.precision import StepPrecision
from tbps_common.run.randomness import rng_state, seed_everything, set_rng_state
from tbps_common.run.session import Run
from tbps_common.run.state import restore_state, save_state
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("mra.train")

LOG_NAME = "log.txt"
BEST_NAME = "checkpoint_best.pth"
VERSION = 1
# Steps in a row that the gradient scaler may leave out before the run ends.
LEFT_OUT_AT_MOST = 100


def train(config: dict[str, Any], args: argparse.Namespace, run: Run, annotation: Annotation) -> int:
    """Train what the flags of `Retrieval.py` describe, from the start or from `last.pth`.

    Args:
        config: configuration of the task, without the flags.
        args: flags, checked by `mra.preflight.check_run`.
        run: this process.
        annotation: as far as it has been read.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop.

    Raises:
        InputError: data, weights or checkpoint cannot be used; the output folder has not been made then.
        OSError: the output folder cannot be written.
        FloatingPointError: the loss is no longer a finite number.
    """
    if args.select == "test":
        logger.warning(
            "the best epoch is chosen on the test split, as in the released code; --select val chooses it on the "
            "validation split"
        )
    return Training(config, args, run, annotation).train()


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0
    """Epochs that are trained and evaluated."""
    batch: int = 0
    """Batches trained of the epoch after them."""
    trained: bool = False
    """Whether these are all of its batches, so that only the evaluation is left."""
    steps: int = 0
    """Optimizer steps done, as the schedule counts them."""
    best_r1: float = 0.0
    best_epoch: int = 0
    log: list[str] = field(default_factory=list)
    """Lines of log.txt, one per epoch."""


class Training:
    """A run from its first batch to its last; the arguments are those of `train`."""

    def __init__(self, config: dict[str, Any], args: argparse.Namespace, run: Run, annotation: Annotation):
        self.args, self.run, self.settings = args, run, with_overrides(config, args)
        self.folder = Path(args.output_dir)
        self.state_file = self.folder / STATE_NAME
        self.pretraining = "train_file_regions" in self.settings
        seed_everything(args.seed + run.ranks.rank)

        self.tokenizer = build_tokenizer(self.settings["text_encoder"])
        self.dataset = training_dataset(self.settings, annotation.training)
        batch_size = self.settings["batch_size_train"]
        check_training_size(len(self.dataset), batch_size, run.ranks.world_size)
        self.replaced = replaced_items(args.bad_images, len(self.dataset))
        self.loader, self.batches = training_loader(
            self.dataset,
            self.tokenizer,
            self.settings,
            seed=args.seed,
            ranks=run.ranks,
            num_workers=args.num_workers,
            pin_memory=run.device.type == "cuda",
            replaced=self.replaced,
        )
        file, split = evaluation_files(self.settings)[args.select], annotation.splits.get(args.select)
        self.validation = RetrievalTestDataset(file, self.settings, data=split)

        state = _read_state(self.state_file, self.settings, args.seed, run.ranks) if args.resume else None
        load = state is None and bool(self.settings.get("load_pretrained"))
        self.model = Retrieval(self.settings, init_backbones=state is None and not load)
        if load:
            self.model.load_pretrained(args.checkpoint, self.settings, trust=args.trust_checkpoint)
        self.model.to(run.device)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        logger.info("number of trainable parameters: %d", trainable)
        self.optimizer = create_optimizer(self.model, self.settings["optimizer"])
        per_epoch = math.ceil(len(self.dataset) / (batch_size * run.ranks.world_size))
        self.schedule = Schedule(self.optimizer, self.settings["schedular"], per_epoch)
        # bfloat16 on a GPU; on the CPU everything is float32. The released gradient scaler is left out: bfloat16 reaches as
        # far as float32, and the scale, doubled every 2000 steps, would leave float32's range in a pre-training.
        on_gpu = run.device.type == "cuda"
        self.precision = StepPrecision("bf16" if on_gpu else "fp32", run.device, scale=on_gpu and args.grad_scaler)
        self.meters, self.position, self.left_out = Meters(), Position(), 0
        self.finite = FiniteLoss(run.device, self._not_finite)

        own_rng = None
        if state is not None:
            self.position = Position(**state["progress"])
            own_rng = restore_state(state, self._parts(), run.ranks, source=self.state_file, meters=self.meters)
        # After the optimizer's state, which brings back the rates of that moment.
        self.schedule.set_rates(self.position.steps)
        self.network = run.distribute(self.model)
        self._open_folder(config)
        if own_rng is not None:
            set_rng_state(own_rng)

    def train(self) -> int:
        """Train all remaining epochs; returns the exit status."""
        position, epochs = self.position, self.settings["schedular"]["epochs"]
        if position.epoch >= epochs:
            logger.info("all %d epochs are done already", epochs)
        while position.epoch < epochs:
            stopped = False
            if not position.trained:
                self._train_epoch()
                self._save()
                stopped = not position.trained
            if stopped or not self._finish_epoch() or (self.run.stop_requested() and position.epoch < epochs):
                saved = "resume with the same command and --resume" if self.args.save_every else "nothing was saved"
                logger.info("stopped in epoch %d; %s", position.epoch, saved)
                return self.run.exit_status
        if self.run.is_main:
            self._write_log(position.best_epoch)
        logger.info("best R1: %.3f in epoch %d", position.best_r1, position.best_epoch)
        return 0

    def _train_epoch(self) -> None:
        """Train what is left of the epoch, or until the run is asked to stop."""
        position, run, count = self.position, self.run, self.batches.batches_per_epoch
        if not position.batch:
            self.meters = Meters()
        self.finite, region_weight = FiniteLoss(run.device, self._not_finite), self.settings.get("region", 0)
        self.model.train()
        self.batches.set_position(position.epoch, position.batch)
        logger.info("Train Epoch: [%d]", position.epoch)
        began, first = time.perf_counter(), position.batch
        for batch in run.load(self.loader):
            losses, stepped = training_step(
                self.network, to_device(batch, run.device), region_weight, self.optimizer, self.precision
            )
            self._after_step(losses, stepped)
            position.batch += 1
            last = position.batch == count
            if (position.batch - 1) % self.args.log_every == 0 or last:
                self._log_step(count, (time.perf_counter() - began) / (position.batch - first), first)
            if run.stop_requested():
                break
            if self.args.save_every and position.batch % self.args.save_every == 0 and not last:
                self._save()
        position.trained = position.batch == count
        if self.replaced is not None and (sentence := self.replaced.report(self.dataset.image_path)):
            logger.warning("%s", sentence)
        seconds = int(time.perf_counter() - began)
        logger.info("Train Epoch: [%d] Total time: %s", position.epoch, datetime.timedelta(seconds=seconds))

    def _after_step(self, losses: dict[str, Tensor], stepped: bool) -> None:
        """Advance schedule and meters; count steps that the gradient scaler has left out."""
        if stepped:
            self.position.steps += 1
            self.schedule.set_rates(self.position.steps)
        else:
            losses = {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in losses.items()}
        self.meters.update({"lr": self.optimizer.param_groups[0]["lr"], **losses})
        if not self.precision.scaled:  # with a scaler, a step that is not finite has been left out
            self.finite.update(losses["loss"], self.position.batch + 1)
        self._count_left_out(stepped)

    def _finish_epoch(self) -> bool:
        """Evaluate, log and save a trained epoch; False if the run was asked to stop during the evaluation."""
        position = self.position
        averages = self.meters.averages_of_all(self.run.device)
        rng = rng_state()  # the evaluation must not change what the next epoch draws
        try:
            result = evaluate_split(
                self.model,
                self.validation,
                self.tokenizer,
                self.settings,
                device=self.run.device,
                ranks=self.run.ranks,
                score_world=self.args.score_world,
                num_workers=self.args.num_workers,
                amp=self.args.amp_eval,
                stop=self.run.stop_requested,
                progress=True,
            )
        except EvaluationStopped:
            return False
        set_rng_state(rng)
        metrics = result.itm.metrics
        position.log.append(log_line(position.epoch, metrics, averages))
        if self.run.is_main:
            print(epoch_table(position.log), flush=True)
            self._write_log()
        if metrics["R1"] > position.best_r1:
            position.best_r1, position.best_epoch = metrics["R1"], position.epoch
            if not self.pretraining:
                self._save_weights(BEST_NAME)
        position.epoch += 1
        if self.pretraining and position.epoch == self.settings["schedular"]["epochs"]:
            self._save_weights(f"checkpoint_{position.epoch - 1}.pth")
        position.batch, position.trained = 0, False
        self._save()
        barrier()
        return True

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.precision}

    def _save(self) -> None:
        """Write `last.pth`; every process must call it."""
        if self.args.save_every:
            self.finite.require()
            save_state(
                self.state_file,
                self.run.ranks,
                self._parts(),
                meters=self.meters,
                version=VERSION,
                progress=dataclasses.asdict(self.position),
                config=self.settings,
                seed=self.args.seed,
            )

    def _save_weights(self, name: str) -> None:
        """Write a checkpoint in the released layout."""
        if self.run.is_main:
            save_checkpoint({"model": dict(self.model.state_dict()), "config": self.settings}, self.folder / name)
            logger.info("saved %s", self.folder / name)

    def _write_log(self, best_epoch: int | None = None) -> None:
        """Write log.txt; with `best_epoch` the run is over."""
        text = "".join(f"{line}\n" for line in self.position.log)
        write_text(self.folder / LOG_NAME, text if best_epoch is None else f"{text}best epoch: {best_epoch}")

    def _log_step(self, count: int, seconds: float, first: int) -> None:
        self.finite.require()
        position, values = self.position, self.meters.latest()
        shown = [f"{name}: {value:.{6 if name == 'lr' else 4}f}" for name, value in values.items()]
        waiting = self.run.waiting
        shown += [
            f"time: {seconds:.4f}",
            f"data: {waiting.seconds / (position.batch - first):.4f} ({waiting.share:.0%})",
        ]
        if self.run.device.type == "cuda":
            shown.append(f"max mem: {torch.cuda.max_memory_allocated(self.run.device) / 2**20:.0f}")
        eta = datetime.timedelta(seconds=int((count - position.batch) * seconds))
        where = f"[{position.batch - 1:{len(str(count))}d}/{count}]"
        logger.info("Train Epoch: [%d]  %s  eta: %s  %s", position.epoch, where, eta, "  ".join(shown))

    def _count_left_out(self, stepped: bool) -> None:
        self.left_out = 0 if stepped else self.left_out + 1
        if stepped:
            return
        logger.warning("a step was left out, because its gradients are not finite (%d in a row)", self.left_out)
        if self.left_out >= LEFT_OUT_AT_MOST:
            raise FloatingPointError(
                f"the gradients of {self.left_out} steps in a row are not finite: go back to the last good checkpoint with "
                "a lower --lr"
            )

    def _not_finite(self, step: int) -> str:
        good = (
            f"the last good state is {self.state_file}" if self.state_file.is_file() else "no state has been saved yet"
        )
        return (
            f"the loss is not a finite number in epoch {self.position.epoch}, iteration {step - 1}; {good}; a lower --lr "
            "usually helps"
        )

    def _open_folder(self, config: dict[str, Any]) -> None:
        """Make the output folder: last, so that data or weights that cannot be used leave nothing behind."""
        if self.run.is_main:
            if self.state_file.is_file() and not self.args.resume:
                logger.warning(
                    "%s is the state of an earlier run, which this run replaces; --resume would continue it",
                    self.state_file,
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self.run.log.open(self.folder / "run.log", append=self.args.resume)
            write_config(self.folder / CONFIG_NAME, config)
        barrier()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of the loader with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def training_step(
    network: nn.Module,
    batch: Mapping[str, Any],
    region_weight: float,
    optimizer: torch.optim.Optimizer,
    precision: StepPrecision,
) -> tuple[dict[str, Tensor], bool]:
    """One step of the optimizer: forward, losses, backward.

    Args:
        network: `Retrieval`, or what wraps it.
        batch: of `to_device`.
        region_weight: of the region loss; at 0 there is none.
        optimizer: of the network.
        precision: with a gradient scaler, whether it left the step out is waited for.

    Returns:
        The losses as the log names them, the last one (`loss`) their sum; and False if the step was left out.
    """
    with precision.autocast():
        itc, itm, mlm, region = network(**batch)
        losses = {"loss_itc": itc, "loss_itm": itm, "loss_mlm": mlm}
        loss = itc + itm + mlm
        if region_weight > 0:
            losses["loss_region"] = region
            loss = loss + region_weight * region
    optimizer.zero_grad(set_to_none=True)
    stepped = precision.backward_and_step(loss, optimizer, watch=precision.scaled)
    return {**losses, "loss": loss}, stepped


def log_line(epoch: int, metrics: Mapping[str, float], averages: Mapping[str, float]) -> str:
    """One line of log.txt: a JSON object whose values are all strings.

    Args:
        epoch: counted from 0.
        metrics: percentages.
        averages: meters of the training, in their order.
    """
    entry = {"epo": str(epoch), **{name: str(round(metrics[name], 3)) for name in METRICS}}
    entry |= {name: str(float(f"{value:.5f}")) for name, value in averages.items()}
    return json.dumps(entry)


def epoch_table(lines: Sequence[str]) -> str:
    """Table of all epochs so far, from their lines of log.txt."""
    table = PrettyTable(["epoch", *METRICS])
    for line in lines:
        entry = json.loads(line)
        table.add_row([entry["epo"], *(f"{float(entry[name]):.3f}" for name in METRICS)])
    return str(table)


def _read_state(path: Path, settings: Mapping[str, Any], seed: int, ranks: Ranks) -> dict[str, Any]:
    """Read `last.pth`, and say what has changed since it was written.

    Raises:
        CheckpointError: the file cannot be read or is not such a file, or it lies within an epoch that this run would
            continue with other batches.
    """
    state = load_checkpoint_file(path)
    try:
        if state["version"] != VERSION:
            raise CheckpointError(
                f"{path} was written by another version of this program: finish that run with it, or start again"
            )
        position, processes, stored = Position(**state["progress"]), len(state["rng"]), state["config"]
        before = state["seed"], stored["batch_size_train"], processes
        state["meters"] = [_current_meters(meters) for meters in state["meters"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the state of a training run ({type(error).__name__}: {error}): name the --output_dir of an "
            "interrupted run"
        ) from error
    for key in ("train_file", "train_file_regions"):
        if stored.get(key) != settings.get(key):
            raise CheckpointError(
                f"{path} belongs to a run on other data ({key} was {stored.get(key)!r}, and is {settings.get(key)!r} now): to "
                "continue from its weights, start a run with another --output_dir and the weights as --checkpoint"
            )
    now = seed, settings["batch_size_train"], ranks.world_size
    if before != now and position.batch:
        raise CheckpointError(
            f"{path} lies within an epoch of a run with seed {before[0]} and batches of {before[1]} in {before[2]} "
            f"process(es), and this run has seed {now[0]} and batches of {now[1]} in {now[2]}: resume it with the same"
        )
    for key in dict.fromkeys([*stored, *settings]):
        if stored.get(key) != settings.get(key):
            logger.warning("%s was %r when the run began, and is %r now", key, stored.get(key), settings.get(key))
    where = f", {position.batch} batches of epoch {position.epoch}" if position.batch else ""
    logger.info("resuming from %s: %d epochs done%s", path, position.epoch, where)
    return state


def _current_meters(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Meters as `Meters.load_state_dict` takes them; earlier versions of this program stored one count for all."""
    if "count" not in stored:
        return stored
    sums = {"lr": stored["rate"], **stored["losses"]}
    return {"sums": sums, "weights": dict.fromkeys(sums, stored["count"])}
