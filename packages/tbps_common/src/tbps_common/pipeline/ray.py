"""`--ray`: the shards of a stage as tasks of a Ray cluster, whose machines share the folders that the stage names.

A shard is the stage's own command with `--shard i/n`, so it continues where it was; Ray starts it again elsewhere when a
machine or a process dies. Without Ray, `--shard` does the same by hand (SLURM arrays, Kubernetes jobs).
"""

import argparse
import importlib
import logging
import os
import re
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.progress import progress_bar, watched

LOCAL = "local"

_RETRIES = 5
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10
_STOP_SECONDS = 60
# What the cluster's processes take over from this one: models, keys and threads are chosen by it.
_VARIABLES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH_", "OMP_", "OPENAI_", "TBPS_")


def run_on_ray(main: str, argv: list[str], args: argparse.Namespace) -> int:
    """Run all shards of a stage on a Ray cluster, and show one progress for them.

    Args:
        main: entry point of the stage's command, `module:function`.
        argv: its arguments.
        args: the same, parsed: those of `tbps_common.pipeline.stages.add_shard_flags`.

    Returns:
        The exit status: the worst of the shards.

    Raises:
        InputError: Ray is not installed or cannot be reached, or `--shard` is given too.
    """
    if args.shard.count > 1:
        raise InputError("--ray makes the shards itself: leave out --shard, or start every shard without --ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _connect(args.ray)
    try:
        return _run(ray, main, argv, args)
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'ray>=2.45'") from error
    try:
        found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
        if found is not None:  # Ray itself would go on trying for many minutes
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
        if address == LOCAL:  # on the loopback interface, so that no other machine can hand it code
            ray.init(include_dashboard=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1")
        else:
            ray.init(address=address, logging_level=logging.ERROR)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--ray {address}: no cluster can be reached ({first}): start one with ray start") from error
    return ray


def _run(ray: Any, main: str, argv: list[str], args: argparse.Namespace) -> int:
    from tbps_common.run.stop import Interruption  # which imports torch, and --help must not

    resources = ray.cluster_resources()
    computes = vars(args).get("device", "cpu") != "cpu"  # a stage without the flag asks a server
    gpus = args.ray_gpus if args.ray_gpus is not None else float(computes and resources.get("GPU", 0) > 0)
    places = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1)
    count = args.ray_shards or max(1, int(places))
    progress = ray.remote(num_cpus=0)(_Progress).remote(count)
    environment = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    # A process ends with its shard, so that its GPU memory is free for the next one.
    shard = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES, max_calls=1)(_run_shard)
    waiting = {
        shard.options(name=f"shard {number}/{count}").remote(
            main, [*argv, "--ray", "", "--shard", f"{number}/{count}"], os.getcwd(), environment, progress, number - 1
        ): f"{number}/{count}"
        for number in range(1, count + 1)
    }
    statuses: list[int] = []
    with Interruption() as interruption, progress_bar(0, unit="item", desc=f"{count} shards") as bar:
        while waiting and not interruption.requested:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_POLL_SECONDS)
            bar.total, done = ray.get(progress.read.remote())
            bar.update(done - bar.n)
            for task in ready:
                statuses.append(_status_of(ray, task, waiting.pop(task)))
        if waiting:
            for left in waiting:
                ray.cancel(left)  # as Ctrl-C does, so that a shard ends after its present batch
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_STOP_SECONDS)
            return interruption.exit_status
    return max(statuses)


def _status_of(ray: Any, done: Any, name: str) -> int:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"error: shard {name} was lost {_RETRIES + 1} times ({first})", file=sys.stderr)
        return 1


def _run_shard(main: str, argv: list[str], folder: str, environment: dict[str, str], progress: Any, place: int) -> int:
    """In a process of the cluster: run the stage's command."""
    os.chdir(folder)
    os.environ.update(environment)
    module, function = main.split(":")
    last = [0.0]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - last[0] >= _POLL_SECONDS or done == total:
            last[0] = time.monotonic()
            progress.update.remote(place, done, total)

    with watched(tell), suppress(SystemExit):
        return getattr(importlib.import_module(module), function)(argv)
    return 2


class _Progress:
    """Of all shards; lives in the cluster."""

    def __init__(self, count: int) -> None:
        self._count, self._shards = count, dict[int, tuple[int, int]]()

    def update(self, place: int, done: int, total: int) -> None:
        self._shards[place] = (done, total)

    def read(self) -> tuple[int, int]:
        """Items in all, where those of shards that have not begun are estimated, and those done."""
        known = self._shards.values()
        total = sum(total for _, total in known)
        return round(total * self._count / max(1, len(known))), sum(done for done, _ in known)
