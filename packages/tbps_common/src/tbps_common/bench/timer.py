"""Seconds and peak memory of callables that do the same thing in different ways: the one timer of all benchmarks.

    costs = measure({"direct": direct, "ours": ours}, repeats=5, device=device)
    costs["ours"].milliseconds, costs["direct"].seconds / costs["ours"].seconds, costs["ours"].peak_mib
    assert difference(direct(), ours()) <= 1e-5      # a saving that changes the result is none

Nothing but the standard library is imported until a device or a tensor is looked at.
"""

import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one form took: the fastest of its runs, and the largest peak of memory of all of them.

    Attributes:
        wall_s: wall seconds.
        cpu_s: CPU seconds of this process, all threads together.
        peak_mib: MiB above what was in use before the run: on the GPU for CUDA, else of the whole process.
        seconds: those to compare: CPU seconds on a CPU, which other programs on the machine hardly disturb; wall seconds
            on a GPU.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float
    seconds: float

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds


def measure(
    forms: Mapping[str, Callable[[], Any]], *, repeats: int = 5, device: Any = "cpu", warm_up: bool = True
) -> dict[str, Cost]:
    """Run several forms of one computation in turns, in this process.

    Args:
        forms: name -> callable; its result is dropped.
        repeats: timed runs of each.
        device: where they compute (a name or a `torch.device`).
        warm_up: run each once before, not timed: the first call makes handles, compiles kernels and fills caches.

    Returns:
        Cost of each form.
    """
    on_gpu = str(device).startswith("cuda")
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in forms}
    for turn in range(repeats + warm_up):
        for name, run in forms.items():
            before = _forget_peak(on_gpu, device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if on_gpu:
                _cuda().synchronize(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warm_up:
                runs[name].append((wall, cpu, max(0.0, (_peak(on_gpu, device) - before) / 2**20)))
    costs = {}
    for name, measured in runs.items():
        walls, cpus, peaks = zip(*measured)
        costs[name] = Cost(min(walls), min(cpus), max(peaks), min(walls) if on_gpu else min(cpus))
    return costs


def difference(first: Any, second: Any) -> float:
    """Largest absolute difference of two tensors, numbers, or sequences of them."""
    if isinstance(first, Sequence):
        return max(difference(one, other) for one, other in zip(first, second, strict=True))
    if hasattr(first, "detach"):
        return (first.detach().double() - second.detach().double()).abs().max().item()
    return abs(first - second)


def _cuda() -> Any:
    import torch

    return torch.cuda


def _forget_peak(on_gpu: bool, device: Any) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    gc.collect()
    if on_gpu:
        _cuda().synchronize(device)
        _cuda().reset_peak_memory_stats(device)
        return _cuda().memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return _peak(on_gpu, device)


def _peak(on_gpu: bool, device: Any) -> int:
    if on_gpu:
        return _cuda().max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:  # not Linux: the process's own maximum, which cannot be reset, so the difference may be too small
        maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return maximum if sys.platform == "darwin" else maximum * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")
