"""Runs the methods one after the other, each in a fresh process, relates their costs, and prints them as a table."""

import importlib.util
import multiprocessing
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from prettytable import PrettyTable

from tbps_common.bench.methods import LIBRARIES, METHODS, bytes_per_query, fits, make_features, most_queries, ours
from tbps_common.bench.sizes import Sizes
from tbps_common.bench.timer import linux_bytes, linux_entry, measure
from tbps_common.errors import InputError
from tbps_common.ranking import RetrievalResult

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

    Returns:
        Plain types only. `methods[name]` has `wall_s`, `cpu_s` and `peak_mb` as measured, `queries` run, `scaled` (fewer
        than all), `metrics`, and `agrees` with this package on the same queries. `ratios` compare CPU seconds (wall
        seconds on CUDA) scaled to all queries. `absent` gives the reason why a method did not run.

    Raises:
        InputError: CUDA asked for where there is none.
        RuntimeError: the process of a method that needs no optional library failed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA device, and torch sees none; use --device cpu.")
    memory = _MEMORY_SHARE * free_memory(device)
    methods: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(("gemm", "ours", *against)):
        libraries = LIBRARIES.get(name, ())
        if not fits(name, sizes):
            absent[name] = f"cannot score reduce={sizes.reduce}"
        elif any(importlib.util.find_spec(library) is None for library in libraries):
            absent[name] = "not installed"
        elif device != "cpu" and name not in ("gemm", "ours", "naive"):
            absent[name] = "compared on CPU only"
        else:
            queries = most_queries(name, sizes, memory)
            try:
                methods[name] = in_fresh_process(name, sizes, queries, device, threads, precision, repeats)
            except RuntimeError as error:
                if not libraries:
                    raise
                absent[name] = str(error)  # an optional library that is broken must not cost the other figures
    used_threads = [entry.pop("threads") for entry in methods.values()]
    return {
        "preset": preset,
        "sizes": asdict(sizes),
        "machine": {
            "cpu": linux_entry("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
            "threads": used_threads[-1],
        },
        "precision": precision,
        "repeats": repeats,
        "methods": methods,
        "absent": absent,
        "ratios": _ratios(methods, sizes.queries, "wall_s" if device == "cuda" else "cpu_s"),
    }


def render(report: dict[str, Any]) -> str:
    """One line about the data, one table, and what could not be measured."""
    sizes, machine, methods = report["sizes"], report["machine"], report["methods"]
    on_gpu = machine["device"] != "cpu"
    clock = "wall_s" if on_gpu else "cpu_s"
    full = {name: sizes["queries"] / entry["queries"] for name, entry in methods.items()}
    table = PrettyTable(["method", "wall s", "CPU s", "peak MB", "/ ours", "/ product", "R1", "mAP", "agrees"])
    for column in table.field_names[1:]:
        table.align[column] = "r"
    table.align["method"] = "l"
    for name, entry in methods.items():
        star = "*" if entry["scaled"] else ""
        cost = entry[clock] * full[name]
        metrics = entry["metrics"]
        table.add_row(
            [
                {"gemm": "product alone"}.get(name, name),
                f"{entry['wall_s'] * full[name]:.3f}{star}",
                f"{entry['cpu_s'] * full[name]:.3f}{star}",
                f"{entry['peak_mb']:.0f}" + (f" ({entry['queries']} queries)" if star else ""),
                f"{cost / (methods['ours'][clock] * full['ours']):.2f}",
                f"{cost / (methods['gemm'][clock] * full['gemm']):.2f}",
                f"{metrics['R1']:.2f}" if "R1" in metrics else "-",
                f"{metrics['mAP']:.2f}" if "mAP" in metrics else "-",
                {True: "yes", False: "NO", None: "-"}[entry.get("agrees")],
            ]
        )
    for name, reason in report["absent"].items():
        table.add_row([name, reason, *["-"] * 7])
    lines = [
        f"{report['preset']}: {sizes['queries']} queries x {sizes['gallery']} images x {sizes['tokens']} x {sizes['dim']}, "
        f"{sizes['positives'][0]}-{sizes['positives'][1]} images of an identity, reduce={sizes['reduce']}, "
        f"precision={report['precision']}",
        f"{machine['cpu']}, {machine['threads']} thread(s), {machine['device']}, torch {machine['torch']}; "
        f"best of {report['repeats']}; ratios of {'wall' if on_gpu else 'CPU'} seconds; peak above the features",
        table.get_string(),
    ]
    for name, entry in methods.items():
        if entry["scaled"]:
            estimate = entry.get("estimated_mb")
            needed = "" if estimate is None else f", because all would take about {estimate / 1000:.1f} GB"
            lines.append(
                f"* {name}: run on {entry['queries']} of {sizes['queries']} queries{needed}; seconds scaled to all."
            )
    return "\n".join(lines)


def in_fresh_process(method: str, *arguments: Any) -> dict[str, Any]:
    """Measure one method in a process of its own; RuntimeError if that fails."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run, method, *arguments).result()
        except Exception as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise RuntimeError(f"The process that measures {method} failed: {cause}") from error


def _run(
    method: str, sizes: Sizes, queries: int, device: str, threads: int, precision: str, repeats: int
) -> dict[str, Any]:
    """Measure one method in this process, which must be a fresh one: its peak counts memory above the features."""
    if threads:
        torch.set_num_threads(threads)
    features = make_features(sizes, torch.device(device))
    features = replace(features, query=features.query[:queries], q_pids=features.q_pids[:queries])
    found: list[Any] = []

    def run() -> None:
        found[:] = [METHODS[method](features, sizes, precision)]

    cost = measure({method: run}, repeats=repeats, device=device, warm_up=device == "cuda")[method]
    answer = {
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "peak_mb": cost.peak_mib * 2**20 / 1e6,
        "queries": queries,
        "scaled": queries < sizes.queries,
        "threads": torch.get_num_threads(),
        "metrics": found[0].metrics if isinstance(found[0], RetrievalResult) else found[0] or {},
    }
    if needed := bytes_per_query(method, sizes):
        answer["estimated_mb"] = round(needed * sizes.queries / 1e6, 3)
    if answer["metrics"]:
        own = ours(features, sizes, precision).metrics
        answer["agrees"] = all(abs(own[name] - value) <= AGREEMENT_PERCENT for name, value in answer["metrics"].items())
    return answer


def _ratios(methods: dict[str, Any], queries: int, clock: str) -> dict[str, float]:
    full = {name: entry[clock] * queries / entry["queries"] for name, entry in methods.items()}
    ratios = {"ours_over_gemm": full["ours"] / full["gemm"]}
    for name in [*methods][2:]:  # after the product and ours
        ratios[f"{name}_over_ours"] = full[name] / full["ours"]
        ratios[f"ours_over_{name}"] = full["ours"] / full[name]
        if not methods[name]["scaled"] and methods[name]["peak_mb"]:
            ratios[f"ours_peak_over_{name}_peak"] = methods["ours"]["peak_mb"] / methods[name]["peak_mb"]
    return {name: round(value, 4) for name, value in ratios.items()}


def free_memory(device: str) -> int:
    """Bytes that are free on the device, or in this machine for the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return linux_bytes("/proc/meminfo", "MemAvailable") or 8 << 30  # not Linux: a laptop's worth
