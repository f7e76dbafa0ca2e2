"""`run.py`: how many processes, on which GPUs, and what becomes of signals and their exit status.

The processes find a folder of this program through an environment variable. Each one leaves its process id there, so that
a signal goes to exactly those that can save their state; the first one leaves the exit status, which torchrun would replace
by 1; and a pipe in it tells them if this program is killed. (torch's `elastic_launch` gives its processes 30 seconds after a
signal and then kills them, which is too short to save a large model.)
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra.config import config_path, load_config, with_overrides
from mra.options import DISTS, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE, retrieval_arguments
from mra.preflight import check_run
from tbps_common.errors import InputError
from tbps_common.run.command import usable_processors

LAUNCH_FOLDER = "MRA_LAUNCH_FOLDER"


@dataclass(frozen=True)
class Plan:
    """Which processes to start on this machine."""

    asked: int
    """Processes per node that `--dist` (or `--nproc`) asks for."""
    processes: int
    """Processes per node that run."""
    gpus: str | None
    """Value of CUDA_VISIBLE_DEVICES; None: no GPU is used."""
    nodes: int = 1
    node: int = 0

    @property
    def launcher(self) -> bool:
        """Whether torch.distributed.run is needed."""
        return self.processes > 1 or self.nodes > 1


class LaunchFolder:
    """The folder through which `run.py` and its processes know of each other."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)

    @classmethod
    def of_this_process(cls) -> "LaunchFolder | None":
        """That of the launch which this process belongs to; None if `run.py` has not started it."""
        folder = os.environ.get(LAUNCH_FOLDER)
        return cls(folder) if folder and Path(folder).is_dir() else None

    # What run.py calls.

    def processes(self) -> list[int]:
        """Process ids of the processes that have come up."""
        return [int(path.read_text(encoding="utf-8")) for path in self._folder.glob("*.pid")]

    def status(self) -> int | None:
        """Exit status of the first process, or None if it left none (it was killed)."""
        try:
            return int((self._folder / "status").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Hold the pipe open that the processes read: when it ends, `run.py` is gone."""
        if not hasattr(os, "mkfifo"):
            yield
            return
        os.mkfifo(self._pipe)
        descriptor = os.open(self._pipe, os.O_RDWR)  # reading too, because opening for writing alone would wait
        try:
            yield
        finally:
            os.close(descriptor)

    # What a process of the run calls.

    def announce(self, local_rank: int) -> None:
        """Say that signals can be handled from now on; if `run.py` is killed, stop as after a SIGTERM."""
        if self._pipe.exists():
            threading.Thread(target=self._watch, name="watch run.py", daemon=True).start()
        partial = self._folder / f"{local_rank}.partial"
        partial.write_text(str(os.getpid()), encoding="utf-8")
        partial.rename(self._folder / f"{local_rank}.pid")

    def report(self, status: int) -> None:
        """Leave the exit status of the first process."""
        partial = self._folder / "status.partial"
        partial.write_text(str(status), encoding="utf-8")
        partial.rename(self._folder / "status")

    @property
    def _pipe(self) -> Path:
        return self._folder / "alive"

    def _watch(self) -> None:
        descriptor = os.open(self._pipe, os.O_RDONLY)
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)


def asked_world(dist: str) -> int:
    """Processes, over all nodes, that a `--dist` value asks for: the default of `--score_world`.

    Raises:
        InputError: unknown `dist`.
    """
    if dist not in DISTS:
        raise InputError(f"--dist {dist} is not one of {', '.join(DISTS)}")
    return {"f4": 4, "m0": 8, "m1": 8}.get(dist, 1)


def plan_processes(
    dist: str, *, gpu_count: int, visible: str | None = None, nproc: int | None = None, processors: int = 1
) -> Plan:
    """Fit the request to the machine.

    Args:
        dist: `--dist`.
        gpu_count: GPUs that torch sees; 0 also for `--device cpu`.
        visible: the user's CUDA_VISIBLE_DEVICES, whose entries `dist` counts; None if unset.
        nproc: `--nproc`.
        processors: as many processes run on the CPU at the most.

    Raises:
        InputError: unknown `dist`, or it names a GPU that is not among the visible ones.
    """
    world = asked_world(dist)
    nodes, node = (2, int(dist[1])) if dist in ("m0", "m1") else (1, 0)
    asked = nproc or (NPROC_PER_NODE if world > 1 else 1)
    if gpu_count == 0:
        return Plan(asked, min(nproc or 1, processors), None, nodes, node)
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(gpu_count)]
    names = names[:gpu_count]
    if dist.startswith("gpu"):
        chosen = int(dist.removeprefix("gpu"))
        if chosen >= len(names):
            raise InputError(
                f"--dist {dist} asks for GPU {chosen} (counted from 0), but only {len(names)} can be seen "
                f"({', '.join(names)}): choose another, or check CUDA_VISIBLE_DEVICES"
            )
        names = [names[chosen]]
    processes = min(asked, len(names))
    return Plan(asked, processes, ",".join(names[:processes]), nodes, node)


def plan_sentence(plan: Plan, dist: str, batch: int) -> str | None:
    """What is said where the machine has less than was asked for, or None."""
    if plan.processes == plan.asked and plan.gpus is not None:
        return None
    where = "on the CPU" if plan.gpus is None else f"on GPU {plan.gpus}"
    found = "no GPU can be used" if plan.gpus is None else f"{plan.processes} can be seen"
    per_node = " per node" if plan.nodes > 1 else ""
    text = (
        f"--dist {dist} asks for {plan.asked} process(es) with a GPU each{per_node}, {found}: running {plan.processes}"
    )
    text += f" {where}"
    if plan.processes != plan.asked:
        now, before = (count * plan.nodes * batch for count in (plan.processes, plan.asked))
        text += f"; a training step sees {now} images instead of {before}, the learning rate stays"
    return text


def launch(args: argparse.Namespace) -> int:
    """Run what the flags of `run.py` describe; returns the exit status of the processes.

    Raises:
        InputError: flags, configuration, data or weights cannot be used; nothing has been started or written.
    """
    if args.score_world is None:
        args.score_world = asked_world(args.dist)
    config_file = config_path(args.task)
    config = load_config(config_file)
    check_run(config, config_file, args)
    gpus = 0 if args.device == "cpu" else _count_gpus()
    plan = plan_processes(
        args.dist,
        gpu_count=gpus,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        nproc=args.nproc,
        processors=usable_processors(),
    )
    if plan.launcher and ":" in args.device:
        raise InputError(f"--device {args.device} is one GPU, but {plan.processes} processes run: use --dist gpuN")
    port = choose_port(args, plan)
    print(
        f"NNODES {plan.nodes}, NPROC_PER_NODE {plan.processes}, MASTER_ADDR {args.master_addr}, MASTER_PORT {port}, "
        f"NODE_RANK {plan.node}",
        flush=True,
    )
    said = plan_sentence(plan, args.dist, with_overrides(config, args).get("batch_size_train", 0))
    if said:
        print(said, flush=True)
    if plan.nodes > 1 and args.master_addr == MASTER_ADDR:
        print(f"--master_addr is {MASTER_ADDR}: both nodes must be this machine", flush=True)
    command = [sys.executable, *_launcher(plan, args.master_addr, port), *_program()]
    command += retrieval_arguments(args, config_file)
    print(f"$ {shlex.join(command)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mra-run-") as folder:
        return supervise(command, _environment(plan, folder), plan, LaunchFolder(folder))


def supervise(command: list[str], environment: dict[str, str], plan: Plan, launched: LaunchFolder) -> int:
    """Run a command, pass SIGINT and SIGTERM on to its processes, and return their exit status."""
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if child is None:
            return
        processes = launched.processes() if plan.launcher else [child.pid]
        if len(processes) < plan.processes:  # not all have come up, so there is nothing to save
            processes = [child.pid]
        for process in processes:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with launched.alive():
            # In a session of its own: Ctrl-C in the terminal would reach the processes twice, and the second signal
            # means to quit immediately.
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            if received:
                forward(received[-1], None)
            status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    reported = launched.status()
    if reported is not None:
        return reported
    if received and status:
        return 128 + received[-1]
    return status if status >= 0 else 128 - status


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_port(args: argparse.Namespace, plan: Plan) -> int:
    """The port asked for; without such a wish 3006, or a free one where a single node finds that busy."""
    wish = args.master_port or int(os.environ.get("MASTER_PORT", "0") or 0)
    if wish or plan.nodes > 1:
        return wish or MASTER_PORT
    for port in (MASTER_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind((MASTER_ADDR, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    return MASTER_PORT


def _launcher(plan: Plan, address: str, port: int) -> list[str]:
    if not plan.launcher:
        return []
    return [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={plan.processes}",
        f"--nnodes={plan.nodes}",
        f"--node_rank={plan.node}",
        f"--master_addr={address}",
        f"--master_port={port}",
    ]


def _program() -> list[str]:
    """`Retrieval.py` beside the `run.py` that was started; the same program as a module for the console script."""
    started = Path(sys.argv[0]).resolve()
    beside = started.with_name("Retrieval.py")
    return [str(beside)] if started.name == "run.py" and beside.is_file() else ["-m", "mra"]


def _environment(plan: Plan, folder: str) -> dict[str, str]:
    environment = dict(os.environ)
    # This program decides about the processes, wherever it was started itself.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        environment.pop(name, None)
    environment[LAUNCH_FOLDER] = folder
    if plan.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = plan.gpus
    if plan.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.processes)))
    return environment
