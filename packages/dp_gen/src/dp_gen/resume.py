"""Checkpoint folders in accelerate's layout: found, written whole or not at all, pruned, and resumed from.

output_dir/checkpoint-<update>/
  model.safetensors  optimizer.bin  scheduler.bin  [scaler.pt]  random_states_<rank>.pkl  progress.json
"""

import copy
import json
import logging
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dp_gen.model.weights import STATE_FILES, load_checkpoint, write_errors
from tbps_common.errors import CheckpointError
from tbps_common.files import write_json
from tbps_common.run.checkpoint import load_checkpoint_file

WEIGHTS, POSITION = STATE_FILES[0], "progress.json"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.bin", "scheduler.bin", "scaler.pt"

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: optimizer updates.
        epoch: epochs completed.
        batch: batches used of the present epoch, on every process.
        seed: that decides the order of the data.
        samples_per_batch: samples of one batch over all processes.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seed: int = 0
    samples_per_batch: int = 0

    def belongs_to(self, seed: int, samples_per_batch: int) -> None:
        """Go on in a run with this seed and this size of a batch."""
        before = self.samples_per_batch or samples_per_batch
        if before != samples_per_batch:
            logger.warning("a batch had %d samples before, and has %d now", before, samples_per_batch)
            self.batch = self.batch * before // samples_per_batch
        self.seed, self.samples_per_batch = seed, samples_per_batch


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The folder after `step` updates."""
    return output_dir / f"checkpoint-{step}"


def _step_of(folder: Path) -> int | None:
    """The update that a folder's name gives, or None if it is not the name of a checkpoint."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


# Finding one.


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The folder that `--resume_from_checkpoint` asks for; None to start a new training.

    `latest` is the complete folder of the largest update in `output_dir`; a damaged one is passed over with a warning.
    Anything else is a path, or the name of a folder in `output_dir`.

    Raises:
        CheckpointError: the named folder is absent, incomplete or damaged, or `latest` finds damaged ones only.
    """
    if not wanted:
        return None
    if wanted == "latest":
        return _latest(output_dir)
    folder = Path(wanted) if Path(wanted).is_dir() else output_dir / Path(wanted).name
    if not folder.is_dir():
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted} is neither a folder nor one in {output_dir}: name an existing "
            "checkpoint, or 'latest'"
        )
    if not _is_complete(folder):
        raise CheckpointError(
            f"--resume_from_checkpoint {folder} is not complete (weights, {OPTIMIZER}, {SCHEDULER}): name another one, "
            "or 'latest'; its weights alone start a new training with --load_model"
        )
    if problem := _damage(folder):
        raise CheckpointError(f"--resume_from_checkpoint {folder} is damaged ({problem}): {_instead_of(folder)}")
    return folder


def _latest(output_dir: Path) -> Path | None:
    damaged: dict[Path, str] = {}
    for folder in _complete(output_dir):
        problem = _damage(folder)
        if not problem:
            for other, reason in damaged.items():
                logger.warning("%s is damaged (%s): resuming from %s instead", other, reason, folder)
            return folder
        damaged[folder] = problem
    for folder, problem in damaged.items():
        raise CheckpointError(f"{folder} is damaged ({problem}): {_instead_of(folder)}")
    logger.info("there is no checkpoint in %s to resume from: starting a new training", output_dir)
    return None


def last_good_checkpoint(output_dir: Path, *, other_than: Path | None = None) -> Path | None:
    """The complete, undamaged folder of the largest update."""
    return next((folder for folder in _complete(output_dir) if folder != other_than and not _damage(folder)), None)


def _instead_of(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    other = last_good_checkpoint(folder.parent, other_than=folder)
    if other is not None:
        return f"resume from {other} instead"
    return "copy it again, or remove it to start a new training"


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if path.is_dir() and _step_of(path) is not None]


def _complete(output_dir: Path) -> list[Path]:
    """Checkpoints with all their files, the largest update first."""
    complete = [path for path in _checkpoints(output_dir) if _is_complete(path)]
    return sorted(complete, key=lambda path: _step_of(path) or 0, reverse=True)


def _is_complete(folder: Path) -> bool:
    weights = any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in STATE_FILES)
    return weights and (folder / OPTIMIZER).is_file() and (folder / SCHEDULER).is_file()


def _damage(folder: Path) -> str:
    """What is wrong with a file of a checkpoint, or nothing. Weights are not read: a cut file shows it at its ends."""
    for file in sorted(folder.iterdir()):
        try:
            if file.name == POSITION or file.name.endswith(".index.json"):
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".bin", ".pt") and not _is_whole_archive(file):
                return f"{file.name} is cut off or empty"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file.name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""


def _is_whole_archive(file: Path) -> bool:
    """Whether the directory at the end of a file of `torch.save` is there; torch's oldest format, a pickle, has none."""
    with open(file, "rb") as stream:
        return zipfile.is_zipfile(stream) or stream.seek(0) == 0 and stream.read(1) == b"\x80"


# Writing one.


class CheckpointWriter:
    """Writes `checkpoint-<update>` beside the training, which waits only while what it changes is copied.

    At the paper's size a checkpoint is 11.6 GB. Its copy lies in the memory of the host until it is written; there is never
    more than one, because the next checkpoint waits for it. As a context it ends when all is written.

    Args:
        accelerator: of the run.
        model: not as it is wrapped for several processes.
        optimizer: of `accelerator.prepare`.
        scheduler: of `accelerator.prepare`.
        output_dir: folder of the checkpoints.
        prune: called with the update of a checkpoint as soon as that is there.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        output_dir: Path,
        prune: Callable[[int], None],
    ):
        self.accelerator, self.output_dir, self.prune = accelerator, output_dir, prune
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()
        if error[0] is None:
            self.wait()

    def save(self, position: Position) -> Path:
        """Begin to write a checkpoint; every process must call it.

        Returns:
            Its folder, which is there after `wait`.

        Raises:
            OSError: this one or the one before it cannot be written; nothing of it is left behind, an earlier folder stays.
        """
        self.wait()
        target = checkpoint_folder(self.output_dir, position.step)
        partial, main = target.with_name(f"{target.name}.tmp"), self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with _removed_on_error(partial if main else None), write_errors(target):
            torch.save(
                _random_states(self.accelerator.step), partial / f"random_states_{self.accelerator.process_index}.pkl"
            )
        self.accelerator.wait_for_everyone()
        if main:
            self._writing = self._thread.submit(self._write, partial, target, *self._copies(), asdict(position))
        return target

    def wait(self) -> None:
        """Until all is written; raises as `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _copies(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The weights, and the other files; weights that are not trained are not copied."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        weights = {
            name: tensor if name in frozen else tensor.to("cpu", copy=True)
            for name, tensor in self.model.state_dict().items()
        }
        states = {
            OPTIMIZER: _host_copy(self.optimizer.state_dict()),
            SCHEDULER: _host_copy(self.scheduler.state_dict()),
        }
        if self.accelerator.scaler is not None:
            states[SCALER] = self.accelerator.scaler.state_dict()
        return weights, states

    def _write(
        self,
        partial: Path,
        target: Path,
        weights: dict[str, torch.Tensor],
        states: dict[str, Any],
        position: dict[str, int],
    ) -> None:
        """Fill the temporary folder, flush it to disk, and let it take the place of `target`."""
        with _removed_on_error(partial), write_errors(target):
            contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt"})
            for name, state in states.items():
                torch.save(state, partial / name)
            write_json(partial / POSITION, position)
            for file in partial.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        logger.info("saved %s", target)
        self.prune(position["step"])


@contextmanager
def _removed_on_error(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _host_copy(value: Any) -> Any:
    """The value with copies of all its tensors in the memory of the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _host_copy(item) for name, item in value.items()}
    return [_host_copy(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def _random_states(step: int) -> dict[str, Any]:
    """Of this process, as accelerate stores them, with accelerate's own count of batches."""
    states = {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    return {**states, "torch_cuda_manual_seed": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else states


def remove_partial(output_dir: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(output_dir: Path, keep: int, interval: int | None) -> None:
    """Delete all checkpoints but that of update `keep` and those of every `interval`-th update."""
    for folder in _checkpoints(output_dir):
        step = _step_of(folder)
        if step != keep and not (interval and step is not None and step % interval == 0):
            shutil.rmtree(folder, ignore_errors=True)


# Going on from one.


def read_position(folder: Path, updates_per_epoch: int, accumulation: int) -> Position:
    """The stored position; for a checkpoint without one (the authors' code wrote it) what its name gives.

    Raises:
        CheckpointError: neither is there.
    """
    path = folder / POSITION
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return Position(**{name: int(stored[name]) for name in asdict(Position())})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): {_instead_of(folder)}") from error
    step = _step_of(folder)
    if step is None:
        raise CheckpointError(
            f"{folder} has no {POSITION}, and its name does not give its update: rename it to checkpoint-<update>"
        )
    epoch, update = divmod(step, updates_per_epoch)
    return Position(step=step, epoch=epoch, batch=update * accumulation)


def restore(
    folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, scaler: Any, *, most_steps: int | None
) -> None:
    """Restore weights, optimizer, schedule and scaler; `restore_random_state` is for what comes last.

    Learning rates, weight decay and the like are those of today's flags, at the place of the schedule that was reached.

    Args:
        folder: a checkpoint.
        model: receives the weights.
        optimizer: of `accelerator.prepare`, new.
        scheduler: of `accelerator.prepare`, new.
        scaler: the gradient scaler, or None.
        most_steps: that the schedule can have taken; None for any number.

    Raises:
        CheckpointError: something in the folder is damaged or of another model.
    """
    parts: dict[str, Callable[[Any], None]] = {
        OPTIMIZER: partial(_restore_optimizer, optimizer),
        SCHEDULER: partial(_restore_schedule, optimizer, scheduler.scheduler, most_steps),
    }
    if scaler is not None and (folder / SCALER).is_file():
        parts[SCALER] = scaler.load_state_dict
    try:
        load_checkpoint(model, folder)
        states = {name: load_checkpoint_file(folder / name) for name in parts}
    except CheckpointError as error:
        other = last_good_checkpoint(folder.parent, other_than=folder)
        if other is None:
            raise
        raise CheckpointError(f"{str(error).rstrip('.')}; the checkpoint before it is {other}") from error
    for name, restore_part in parts.items():
        try:
            restore_part(states[name])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{folder / name} does not fit these flags ({error}): resume with the original flags, or start a new "
                "training from its weights with --load_model"
            ) from error


def _restore_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    flags = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, flags):
        group.update(values)


def _restore_schedule(optimizer: Any, schedule: Any, most: int | None, state: Mapping[str, Any]) -> None:
    """Go to the stored place of today's schedule.

    Args:
        optimizer: gets the rates of that place.
        schedule: torch's `LambdaLR`, new.
        most: steps that it can have taken; more come from a version that took a step per process.
        state: of the schedule.
    """
    rates = list(schedule.base_lrs)
    schedule.load_state_dict(state)
    if schedule.base_lrs != rates:
        logger.info("the learning rates are %s now; the checkpoint was trained with %s", rates, schedule.base_lrs)
    if most is not None and schedule.last_epoch > most:
        logger.warning(
            "the checkpoint's learning-rate schedule advanced once per process: training resumes at update %d instead of %d "
            "(--scheduler_steps_per_process keeps it)",
            most,
            schedule.last_epoch,
        )
        schedule.last_epoch = most
    schedule.base_lrs = rates
    for group, rate, factor in zip(optimizer.param_groups, rates, schedule.lr_lambdas):
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def restore_random_state(folder: Path, rank: int) -> None:
    """Continue the random numbers of this process; a file that is missing or of another machine is only reported."""
    path = folder / f"random_states_{rank}.pkl"
    try:
        states = load_checkpoint_file(path)
        version, words, gauss = states["random_state"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = states["numpy_random_seed"]
        np.random.set_state((name, np.asarray(keys), *rest))
        torch.set_rng_state(states["torch_manual_seed"])
        cuda = states.get("torch_cuda_manual_seed")
        if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
        logger.warning(
            "the random numbers of process %d cannot be restored exactly (%s); training continues with others",
            rank,
            error,
        )
