"""What every training command opens first: its place among the processes, its device, its log, and its signals."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from tbps_common.run.batches import freeze_memory
from tbps_common.run.device import choose_device
from tbps_common.run.distributed import Ranks, process_group
from tbps_common.run.logs import RunLog, run_log
from tbps_common.run.stop import AgreedStop, Interruption

# Processes wait for one another's part of an evaluation. One that dies is noticed by torchrun at once.
TIMEOUT_MINUTES = 120

Batch = TypeVar("Batch")


@dataclass
class Waiting:
    """How long a loop has waited for its data; by the host's clock, so on a GPU an upper limit of how long that waited."""

    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def share(self) -> float:
        """Of the time since the loop began."""
        return self.seconds / max(time.perf_counter() - self.began, 1e-9)


@dataclass(frozen=True)
class Run:
    """A training command between its flags and its exit status.

    Attributes:
        ranks: place of this process among all.
        device: where this process computes.
        log: log lines, held back until there is a folder for their file.
        interruption: Ctrl-C and SIGTERM; entered before any loader process exists.
        stop_requested: whether any process was asked to stop; called at the same step on every process.
        waiting: for the data of the latest `load`.
    """

    ranks: Ranks
    device: torch.device
    log: RunLog
    interruption: Interruption
    stop_requested: AgreedStop
    waiting: Waiting = field(default_factory=Waiting)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.ranks.is_main

    @property
    def exit_status(self) -> int:
        """Of a run that was asked to stop and has saved its state: 130 after Ctrl-C, 143 after SIGTERM."""
        return self.interruption.exit_status

    def load(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a loader, whose processes start now; they end early, without an error, if a signal has ended the loader's processes.

        A SIGTERM to the whole process group reaches the loader's processes too. What was trained until then can be saved.
        """
        freeze_memory()
        self.waiting.seconds, self.waiting.began = 0.0, time.perf_counter()
        mark = self.waiting.began
        try:
            for batch in loader:
                self.waiting.seconds += time.perf_counter() - mark
                yield batch
                mark = time.perf_counter()
        except RuntimeError:
            if not self.interruption.requested or self.ranks.distributed:
                raise

    def distribute(self, model: nn.Module, *, unused: Iterable[str] = ()) -> nn.Module:
        """`model` as DistributedDataParallel wraps it for several processes; itself for one.

        Args:
            model: on this process's device.
            unused: names of trained parameters that never get a gradient: the exchange of gradients would wait for them,
                or search the graph of every step for what it lacks.
        """
        if not self.ranks.distributed:
            return model
        # What is frozen while it is wrapped takes no part in the exchange.
        left_out = [model.get_parameter(name).requires_grad_(False) for name in unused]
        devices = [self.device.index] if self.device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        for parameter in left_out:
            parameter.requires_grad_(True)
        return network


@contextmanager
def training_run(*loggers: str, device: str, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Run]:
    """Join the processes, choose the device, show the log, and catch signals, for the length of the context.

    Args:
        *loggers: names of the loggers that are shown; the first one says what ended the run.
        device: the flag `--device`.
        timeout_minutes: how long the processes wait for one that does not come.

    Raises:
        InputError: the device is not there, or the variables of the launcher contradict each other.
    """
    ranks = Ranks.from_environment()
    chosen = choose_device(device, ranks.local_rank)
    with (
        run_log(*loggers, enabled=ranks.is_main) as log,
        process_group(chosen, timeout_minutes) as ranks,
        Interruption() as interruption,
    ):
        try:
            yield Run(ranks, chosen, log, interruption, AgreedStop(interruption, ranks, timeout_minutes))
        except Exception as error:
            logging.getLogger(loggers[0]).error("the run ended: %s", error)
            raise
