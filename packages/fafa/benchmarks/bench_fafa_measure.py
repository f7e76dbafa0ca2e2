"""Timing: both forms take turns in one process, the fastest repeat of each counts."""

import time
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def fastest(forms: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the fastest of `repeats` runs after one to warm up.

    CPU times on a CPU, which other programs on the machine hardly disturb; wall times on a GPU.
    """
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    best = dict.fromkeys(forms, float("inf"))
    for turn in range(repeats + 1):
        for name, run in forms.items():
            start = clock()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            if turn:
                best[name] = min(best[name], 1000 * (clock() - start))
    return best


def difference(first: Any, second: Any) -> float:
    """Largest absolute difference of two tensors, numbers, or sequences of them."""
    if isinstance(first, torch.Tensor):
        return (first.detach().double() - second.detach().double()).abs().max().item()
    if isinstance(first, (list, tuple)):
        return max(difference(a, b) for a, b in zip(first, second))
    return abs(first - second)


def compared(
    what: str, direct: Callable[[], Any], ours: Callable[[], Any], repeats: int, device: torch.device, tolerance: float
) -> Row:
    """One row of the table: times of both forms and how far their results are apart.

    Raises:
        AssertionError: the results differ by more than `tolerance`; a saving that changes them is none.
    """
    apart = difference(direct(), ours())
    assert apart <= tolerance, f"{what}: the two forms differ by {apart:.3g}, more than {tolerance:.3g}"
    return {"what": what, **fastest({"direct": direct, "ours": ours}, repeats, device), "difference": apart}
