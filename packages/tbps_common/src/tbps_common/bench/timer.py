"""Seconds and peak memory of callables that do the same thing in different ways: the one timer of all benchmarks.

costs = measure({"direct": direct, "ours": ours}, repeats=5, device=device)
costs["ours"].milliseconds, costs["direct"].seconds / costs["ours"].seconds, costs["ours"].peak_mib
assert difference(direct(), ours()) <= 1e-5      # a saving that changes the result is none
"""

import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


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
                torch.cuda.synchronize(device)
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


def _forget_peak(on_gpu: bool, device: Any) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak(on_gpu, device)
    return linux_bytes("/proc/self/status", "VmRSS")


def _peak(on_gpu: bool, device: Any) -> int:
    if on_gpu:
        return torch.cuda.max_memory_allocated(device)
    # Not Linux: the process's own maximum, which cannot be reset, so the difference may be too small.
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return linux_bytes("/proc/self/status", "VmHWM") or (maximum if sys.platform == "darwin" else maximum * 1024)


def linux_bytes(file: str, field: str) -> int:
    """An entry that Linux gives in kB; 0 where there is none."""
    return 1024 * int(linux_entry(file, field).removesuffix("kB") or 0)


def linux_entry(file: str, field: str) -> str:
    """The first `field: text` of a file under /proc; empty where there is none."""
    try:
        content = Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in content.splitlines() if line.startswith(field)), "")
