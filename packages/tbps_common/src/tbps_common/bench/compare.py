"""Runs the methods one after the other, each in a fresh process, and relates their costs."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tbps_common.bench.catalogue import METHODS
from tbps_common.bench.presets import Sizes
from tbps_common.errors import InputError
from tbps_common.files import write_json

AGREEMENT_PERCENT = 1e-3
# A method that holds everything may take this share of the memory that is free when the benchmark starts.
_MEMORY_SHARE = 0.4


def compare(
    preset: str,
    sizes: Sizes,
    *,
    against: Sequence[str],
    device: str = "cpu",
    threads: int = 0,
    precision: str = "highest",
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure the bare product, this package and the methods of `against`.

    Args:
        preset: name under which the sizes are reported.
        sizes: shape of the data.
        against: names of `catalogue.METHODS`.
        device: `cpu` or `cuda`.
        threads: CPU threads; 0 leaves the choice to torch.
        precision: of the products.
        repeats: calls of which the best counts.

    Returns:
        Plain types only. `methods[name]` has `wall_s`, `cpu_s` and `peak_mb` as measured, `queries` run, `scaled` (fewer
        than all), `metrics`, and `agrees` with this package on the same queries. `ratios` compare CPU seconds (wall
        seconds on CUDA) scaled to all queries. `absent` tells why a method did not run.

    Raises:
        InputError: CUDA asked for where there is none.
        RuntimeError: the process of a method that needs no optional library failed.
    """
    machine = {"cpu": _processor(), "device": _device_name(device), "torch": version("torch")}
    limit = _MEMORY_SHARE * _free_memory(device)
    methods: dict[str, Any] = {}
    absent: dict[str, str] = {}
    per_query: dict[str, list[float]] = {}
    used_threads = threads
    for name in dict.fromkeys(("gemm", "ours", *against)):
        method = METHODS[name]
        if not method.fits(sizes):
            absent[name] = f"cannot score reduce={sizes.reduce}"
            continue
        if any(importlib.util.find_spec(library) is None for library in method.needs):
            absent[name] = "not installed"
            continue
        if device != "cpu" and name not in ("gemm", "ours", "naive"):
            absent[name] = "compared on CPU only"
            continue
        estimate = method.bytes_per_pair(sizes) * sizes.gallery
        fit = int(limit // estimate) if estimate else sizes.queries
        queries = max(1, int(min(sizes.queries, fit, method.query_limit(sizes))))
        task = {
            "method": name,
            "sizes": sizes.as_dict(),
            "device": device,
            "threads": threads,
            "precision": precision,
            "repeats": repeats,
            "queries": queries,
        }
        try:
            answer = _in_fresh_process(task)
        except RuntimeError as error:
            if not method.needs:
                raise
            absent[name] = str(error)  # an optional library that is broken must not cost the other figures
            continue
        used_threads = answer.pop("threads")
        per_query = answer.pop("per_query", per_query)
        methods[name] = {**answer, "queries": queries, "scaled": queries < sizes.queries}
        if estimate:
            methods[name]["estimated_mb"] = round(estimate * sizes.queries / 1e6, 3)
        if methods[name]["metrics"]:
            own = _metrics_of_first(per_query, queries)
            found = methods[name]["metrics"]
            methods[name]["agrees"] = all(
                abs(found[metric] - value) <= AGREEMENT_PERCENT for metric, value in own.items() if metric in found
            )
    return {
        "preset": preset,
        "sizes": sizes.as_dict(),
        "machine": {**machine, "threads": used_threads},
        "precision": precision,
        "repeats": repeats,
        "methods": methods,
        "absent": absent,
        "ratios": _ratios(methods, sizes.queries, "wall_s" if device == "cuda" else "cpu_s"),
    }


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"  # without importing torch, which the measuring processes do
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA device, and torch sees none; use --device cpu.")
    return torch.cuda.get_device_name()


def _in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    environment = dict(os.environ)
    if task["threads"]:
        environment["OMP_NUM_THREADS"] = str(task["threads"])
    with tempfile.TemporaryDirectory(prefix="tbps-bench-") as folder:
        question, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        write_json(question, task)
        command = [sys.executable, "-m", "tbps_common.bench.worker", str(question), str(answer)]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"The process that measures {task['method']} ended with {done.returncode}: {last}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _metrics_of_first(per_query: dict[str, list[float]], queries: int) -> dict[str, float]:
    ap, inp, first = (per_query[name][:queries] for name in ("ap", "inp", "first_rank"))
    metrics = {f"R{k}": 100.0 * sum(rank <= k for rank in first) / queries for k in (1, 5, 10)}
    return {**metrics, "mAP": 100.0 * sum(ap) / queries, "mINP": 100.0 * sum(inp) / queries}


def _ratios(methods: dict[str, Any], queries: int, clock: str) -> dict[str, float]:
    full = {name: entry[clock] * queries / entry["queries"] for name, entry in methods.items()}
    ratios = {"ours_over_gemm": full["ours"] / full["gemm"]}
    for name in methods:
        if name in ("gemm", "ours"):
            continue
        ratios[f"{name}_over_ours"] = full[name] / full["ours"]
        ratios[f"ours_over_{name}"] = full["ours"] / full[name]
        if not methods[name]["scaled"] and methods[name]["peak_mb"]:
            ratios[f"ours_peak_over_{name}_peak"] = methods["ours"]["peak_mb"] / methods[name]["peak_mb"]
    return {name: round(value, 4) for name, value in ratios.items()}


def _free_memory(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30  # not Linux: a laptop's worth


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
