"""The training of CMLFA from top to bottom: what is built, the loop, the evaluation after an epoch, what is saved.

A run can be stopped after any step and continued to the bit. The order of its batches and their augmentation come from the
global random generators, as in the released code, so a checkpoint holds the generators' states: those of the moment
and, within an epoch, those of the epoch's start, from which its batches are drawn again.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

import cmlfa
from cmlfa.checkpoint import Checkpointer
from cmlfa.config import CONFIG_NAME
from cmlfa.datasets import DistributedIdentitySampler, build_dataloader, prepare_batch
from cmlfa.metrics import EvaluationStopped, Evaluator, metrics_table
from cmlfa.model import CMLFA, ClipGeometry, build_model, clip_geometry
from cmlfa.model.cmlfa import resolve_precision
from cmlfa.options import Options
from cmlfa.run_directory import BEST_NAME, LAST_NAME, open_run_directory, own_run_directory, resume_checkpoint
from cmlfa.solver import build_lr_scheduler, build_optimizer
from tbps_common.datasets.raw import RawDataset
from tbps_common.errors import CheckpointError
from tbps_common.run.batches import ReplacingItems
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks, broadcast_object
from tbps_common.run.meters import Meters
from tbps_common.run.precision import StepPrecision
from tbps_common.run.progress import progress_bar
from tbps_common.run.randomness import all_rng_states, rng_state, seed_everything, set_rng_state
from tbps_common.run.session import Run, training_run
from tbps_common.run.state import require_finite_weights
from tbps_common.run.stop import FiniteLoss

# What a log line shows, in its order. `cmpm_loss` is not logged by the released code; it appears only where it is used.
METERS = ("loss", "sdm_loss", "itc_loss", "id_loss", "mlm_loss", "cmpm_loss", "img_acc", "txt_acc", "mlm_acc")
REMEDY = "a lower --lr, or --precision fp32 or amp, usually helps"

logger = logging.getLogger("IRRA.train")


@dataclass
class State:
    """How far a run has come, beside its weights."""

    epoch: int = 0
    """Completed epochs."""
    best_top1: float = 0.0
    best_epoch: int = 0
    iteration: int = 0
    """Batches trained of the epoch that follows; 0 between two epochs."""
    trained: bool = False
    """Whether these are all of its batches: the run was stopped during the evaluation that follows."""
    epoch_rng: list[dict[str, Any]] | None = None
    """Random state of every process at that epoch's start."""


def train(options: Options, data: RawDataset) -> int:
    """Run a training.

    Args:
        options: flags that `check_training_flags` has passed; `output_dir` becomes the run directory.
        data: the annotations of the data set that they name.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

    Raises:
        InputError: the device, the data, the weights or the checkpoint cannot be used; nothing has been written then.
        OSError: the run directory cannot be written.
        FloatingPointError: the loss or the weights are no longer finite numbers.
    """
    if options.local_rank and "LOCAL_RANK" not in os.environ:
        # The launcher before torchrun passed --local_rank instead of setting the variable.
        os.environ["LOCAL_RANK"] = str(options.local_rank)
    with training_run("IRRA", "cmlfa", device=options.device) as run, ExitStack() as closing:
        return _train(options, data, run, closing)


def _train(options: Options, data: RawDataset, run: Run, closing: ExitStack) -> int:
    # What is built. The run directory comes last, so that flags or files that cannot be used leave nothing behind.
    _log_start(options, run)
    # Files may appear while the processes start: the main process decides for all.
    source = broadcast_object(resume_checkpoint(options) if run.is_main else None) if options.resume else None
    seed_everything(options.seed + run.ranks.rank)
    loader, images, captions, num_classes = build_dataloader(options, data)
    evaluator = Evaluator(images, captions)
    model = build_model(options, num_classes, geometry=_stored_geometry(source, options)).to(run.device)
    logger.info("Total params: %.1fM", sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    optimizer = build_optimizer(options, model)
    schedule = build_lr_scheduler(options, optimizer)
    precision = _step_precision(options, run.device)
    checkpointer = Checkpointer(model, optimizer, schedule, save_to_disk=run.is_main)
    meters = Meters()
    state, rng = _resume(source, options, checkpointer, precision, meters, run.ranks) if source else (State(), None)
    directory = broadcast_object(open_run_directory(source, options, run.log) if run.is_main else Path())
    checkpointer.save_dir = str(directory)
    writer = SummaryWriter(str(directory), purge_step=state.epoch + 1) if run.is_main else None
    closing.enter_context(writer or nullcontext())
    network = run.distribute(model, unused=model.unused_parameters)
    if rng is not None:
        set_rng_state(rng)

    def save(name: str, **entries: Any) -> None:
        require_finite_weights(model, f"{_last_good(directory)}; {REMEDY}")
        checkpointer.save(name, num_epoch=options.num_epoch, **entries)

    def save_last(rng: list[dict[str, Any]]) -> None:
        save(LAST_NAME, rng=rng, **_entries_of_last(state, meters, precision))

    # The loop.
    if state.epoch >= options.num_epoch:
        logger.info("all %d epochs are done already", options.num_epoch)
    for epoch in range(state.epoch + 1, options.num_epoch + 1):
        lr = optimizer.param_groups[0]["lr"]
        if not state.trained:
            finite = FiniteLoss(run.device, partial(_not_finite, epoch, lr, directory))
            started, trained_before, samples = time.perf_counter(), state.iteration, 0
            network.train()
            for batch in run.load(_batches_left(loader, epoch, state, run)):
                outputs = training_step(network, prepare_batch(batch, run.device), optimizer, precision)
                state.iteration += 1
                samples += len(batch["pids"])
                finite.update(outputs["loss"], state.iteration)
                update_meters(meters, outputs, len(batch["pids"]))
                if state.iteration % options.log_period == 0:
                    finite.require()
                    _log_step(f"Epoch[{epoch}] Iteration[{state.iteration}/{len(loader)}]", meters, lr)
                if run.stop_requested():
                    break
            finite.require()
            _report_replaced(loader)
            if run.stop_requested():
                # Before the first step, only the order of the batches has been drawn.
                save_last(all_rng_states(run.ranks) if state.iteration else state.epoch_rng or [])
                return _stopped(run, epoch, directory)
            seconds = time.perf_counter() - started
            _log_speed(epoch, seconds, state.iteration - trained_before, samples, run.waiting.share)
        _write_scalars(writer, {"lr": lr, "temperature": options.temperature, **shown_averages(meters)}, epoch)

        # The evaluation.
        metrics: dict[str, float] | None = None
        if epoch % options.eval_period == 0:
            rng_states = all_rng_states(run.ranks)
            metrics = broadcast_object(_evaluate(model, evaluator, options, epoch, run) if run.is_main else None)
            if metrics is None:
                state.trained, state.epoch_rng = True, rng_states
                save_last(rng_states)
                return _stopped(run, epoch, directory)
            _write_scalars(writer, {f"eval/{name}": value for name, value in metrics.items()}, epoch)

        # What is saved.
        schedule.step()
        state.epoch, state.iteration, state.trained = epoch, 0, False
        meters = Meters()
        if metrics is not None and metrics["R1"] > state.best_top1:
            state.best_top1, state.best_epoch = metrics["R1"], epoch
            save(BEST_NAME, epoch=epoch, iteration=0)
        save_last(all_rng_states(run.ranks))
        if run.stop_requested():
            return _stopped(run, epoch, directory)
    _log_end(state, directory)
    return 0


def training_step(
    network: nn.Module, batch: dict[str, Tensor], optimizer: Optimizer, precision: StepPrecision
) -> dict[str, Tensor]:
    """One step of the optimizer, on a batch of `prepare_batch`: its losses and accuracies, and their sum `loss`."""
    with precision.autocast():
        outputs = network(batch)
    loss = torch.stack([value.float() for name, value in outputs.items() if "loss" in name]).sum()
    optimizer.zero_grad(set_to_none=True)
    precision.backward_and_step(loss, optimizer)
    return {**outputs, "loss": loss}


def _batches_left(loader: DataLoader, epoch: int, state: State, run: Run) -> Iterator[dict[str, Tensor]]:
    """The batches of an epoch that are not trained yet.

    The others of an interrupted epoch are drawn again, in the same order and with the same worker seeds, and passed over;
    then the random numbers continue where they were.
    """
    if isinstance(loader.sampler, (DistributedSampler, DistributedIdentitySampler)):
        loader.sampler.set_epoch(epoch)
    trained, now = state.iteration, rng_state()
    if trained and state.epoch_rng is not None:
        logger.info("skipping the %d batches of epoch %d that are trained already", trained, epoch)
        set_rng_state(state.epoch_rng[run.ranks.rank])
    else:
        state.epoch_rng = all_rng_states(run.ranks)
    with progress_bar(len(loader), unit="batch", desc=f"epoch {epoch}", enabled=run.is_main) as bar:
        batches = iter(loader)
        try:
            for _ in range(trained):
                next(batches, None)
                bar.update()
        finally:  # a signal may end the loader's processes here too
            if trained:
                set_rng_state(now)
        for batch in batches:
            yield batch
            bar.update()


def _evaluate(model: CMLFA, evaluator: Evaluator, options: Options, epoch: int, run: Run) -> dict[str, float] | None:
    """Metrics of text-to-image retrieval, or None if the run was asked to stop meanwhile."""
    try:
        results = evaluator.retrieve(model, stop_requested=lambda: run.interruption.requested)
    except EvaluationStopped:
        return None
    # The batch size is part of the result: with --lfa_attention batch the features depend on it.
    logger.info(
        "Validation Results - Epoch: %d (%s split, batch size %d, lfa_attention %s)",
        epoch,
        options.validation_split,
        options.batch_size,
        options.lfa_attention,
    )
    evaluator.logger.info("\n%s", metrics_table(results))
    return dict(results["t2i"].metrics)


def _step_precision(options: Options, device: torch.device) -> StepPrecision:
    """Only `amp` computes under autocast: in bfloat16 where the device has it, else in float16 with a gradient scaler."""
    if options.precision != "amp":
        return StepPrecision("fp32", device)
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    logger.info("amp computes in %s", "bfloat16" if has_bfloat16 else "float16")
    return StepPrecision("bf16" if has_bfloat16 else "fp16", device)


def _resume(
    source: Path,
    options: Options,
    checkpointer: Checkpointer,
    precision: StepPrecision,
    meters: Meters,
    ranks: Ranks,
) -> tuple[State, dict[str, Any] | None]:
    """Load a checkpoint; how far its run had come, and the random state of this process.

    A file of the released code stores neither the best R1 nor random states: the best R1 then counts from 0, the random
    state is None, and both are logged.

    Raises:
        CheckpointError: the file does not fit, or lies within an epoch and cannot be continued there.
    """
    entries = checkpointer.resume(source, trust=options.trust_checkpoint)
    own = own_run_directory(source)
    if "best_top1" not in entries and own is not None and source.stem != LAST_NAME:
        # best.pth keeps to the released layout, which has no score; last.pth of the same run knows it.
        beside = load_checkpoint_file(own / f"{LAST_NAME}.pth", trust=options.trust_checkpoint, mmap=True)
        entries |= {name: beside[name] for name in ("best_top1", "best_epoch") if name in beside}
    try:
        precision.load_state_dict(entries.get("scaler", {}))
        iteration = int(entries.get("iteration", 0))
        state = State(
            epoch=int(entries.get("epoch", 0)) - (iteration > 0),
            best_top1=float(entries.get("best_top1") or 0.0),
            best_epoch=int(entries.get("best_epoch") or 0),
            iteration=iteration,
        )
        rng = entries.get("rng") or []
        if iteration:
            state.trained, state.epoch_rng = bool(entries["trained"]), entries["epoch_rng"]
            meters.load_state_dict(entries["meters"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be resumed: its entry for the progress of the run is damaged ({error}); name another "
            "checkpoint with --resume_ckpt_file"
        ) from error
    if "best_top1" not in entries:
        logger.warning("%s stores no best R1 (the released code does not): counting from 0", source)
    where = f", after iteration {iteration}" if iteration else " done"
    logger.info("resuming from %s: epoch %d%s, best R1 %s", source, entries.get("epoch", 0), where, state.best_top1)
    if len(rng) == ranks.world_size:
        return state, rng[ranks.rank]
    if iteration:
        raise CheckpointError(
            f"{source} was written within an epoch by {len(rng)} processes, and this run has {ranks.world_size}: "
            f"resume it with {len(rng)} processes"
        )
    logger.warning(
        "%s holds the random state of %d processes, and this run has %d: it continues, but not exactly as it would have",
        source,
        len(rng),
        ranks.world_size,
    )
    return state, None


def _stored_geometry(source: Path | None, options: Options) -> ClipGeometry | None:
    """Sizes of the CLIP towers in the checkpoint to resume from: the start weights are not needed again."""
    if source is None:
        return None
    content = load_checkpoint_file(source, trust=options.trust_checkpoint, mmap=True)
    return clip_geometry(find_state_dict(content, source=str(source))[0], str(source), prefix="base_model.")


def _entries_of_last(state: State, meters: Meters, precision: StepPrecision) -> dict[str, Any]:
    """What `last.pth` holds beyond the released layout, for `_resume`.

    The released code stores the number of completed epochs; within an epoch, `iteration` is above 0 and `epoch` its number.
    """
    entries: dict[str, Any] = {
        "epoch": state.epoch + (state.iteration > 0),
        "iteration": state.iteration,
        "best_top1": state.best_top1,
        "best_epoch": state.best_epoch,
    }
    if state.iteration:
        entries |= {"trained": state.trained, "epoch_rng": state.epoch_rng, "meters": meters.state_dict()}
    scaler = precision.state_dict()
    return {**entries, "scaler": scaler} if scaler else entries


def _not_finite(epoch: int, lr: float, directory: Path, iteration: int) -> str:
    return (
        f"the loss is not a finite number in epoch {epoch}, iteration {iteration} (base learning rate {lr:.2e}); "
        f"{_last_good(directory)}; {REMEDY}"
    )


def _last_good(directory: Path) -> str:
    path = directory / f"{LAST_NAME}.pth"
    return f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint has been written yet"


def update_meters(meters: Meters, values: Mapping[str, Tensor], batch_size: int) -> None:
    """Averages are weighted by batch size, but `mlm_acc` counts every batch once, as in the released code."""
    meters.update({name: values[name] for name in METERS[:-1] if name in values}, batch_size)
    meters.update({name: values[name] for name in METERS[-1:] if name in values})


def shown_averages(meters: Meters) -> dict[str, float]:
    """The averages above zero, which alone are logged."""
    averages = meters.averages()
    return {name: averages[name] for name in METERS if averages.get(name, 0) > 0}


def _log_step(where: str, meters: Meters, lr: float) -> None:
    averages = "".join(f", {name}: {value:.4f}" for name, value in shown_averages(meters).items())
    logger.info("%s%s, Base Lr: %.2e", where, averages, lr)


def _log_speed(epoch: int, seconds: float, batches: int, samples: int, waiting: float) -> None:
    logger.info(
        "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s] Waiting for data: %.0f%%",
        epoch,
        seconds / max(1, batches),
        samples / seconds,
        100 * waiting,
    )


def _write_scalars(writer: SummaryWriter | None, values: Mapping[str, float], epoch: int) -> None:
    """TensorBoard, on the main process."""
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()


def _report_replaced(loader: DataLoader) -> None:
    """Name the images that `--bad_images skip` has replaced."""
    items: Any = loader.dataset
    if isinstance(items, ReplacingItems):
        sentence = items.replaced.report(lambda index: items.dataset.dataset[index][2])
        if sentence is not None:
            logger.warning("%s", sentence)


def _log_start(options: Options, run: Run) -> None:
    logger.info("cmlfa %s, torch %s, %d process(es)", cmlfa.__version__, torch.__version__, run.ranks.world_size)
    precision = resolve_precision(options.precision, run.device.type)
    logger.info("%s", device_sentence(options.device, run.device, precision))
    for name in ("masked_token_rate", "masked_token_unchanged_rate"):
        if getattr(options, name) != getattr(Options, name):
            logger.warning("--%s has no effect: masking uses fixed probabilities, as in the released code", name)


def _stopped(run: Run, epoch: int, directory: Path) -> int:
    """The exit status of a run that has saved its state."""
    path = directory / f"{LAST_NAME}.pth"
    logger.info("stopped in epoch %d; continue with --resume --resume_ckpt_file %s", epoch, path)
    return run.exit_status


def _log_end(state: State, directory: Path) -> None:
    if state.best_epoch:
        logger.info("best R1: %s at epoch %d", state.best_top1, state.best_epoch)
    else:
        logger.info(
            "no epoch was evaluated with an R1 above 0, so there is no %s.pth; the last weights are in %s",
            BEST_NAME,
            directory / f"{LAST_NAME}.pth",
        )
    logger.info("test it with: python test.py --config_file '%s'", directory / CONFIG_NAME)
