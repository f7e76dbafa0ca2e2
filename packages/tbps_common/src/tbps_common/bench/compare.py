"""Runs the methods one after the other, each in a fresh process, relates their costs, and prints them as a table."""

import importlib.util
import multiprocessing
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable

from tbps_common.bench.methods import METHODS, make_features
from tbps_common.bench.sizes import Sizes
from tbps_common.bench.timer import measure
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

    Args:
        preset: name under which the sizes are reported.
        sizes: shape of the data.
        against: names of `methods.METHODS`.
        device: `cpu` or `cuda`.
        threads: CPU threads; 0 leaves the choice to torch.
        precision: of the products.
        repeats: calls of which the best counts.

    Returns:
        Plain types only. `methods[name]` has `wall_s`, `cpu_s` and `peak_mb` as measured, `queries` run, `scaled` (fewer
        than all), `metrics`, and `agrees` with this package on the same queries. `ratios` compare CPU seconds (wall
        seconds on CUDA) scaled to all queries. `absent` gives the reason why a method did not run.

    Raises:
        InputError: CUDA asked for where there is none.
        RuntimeError: the process of a method that needs no optional library failed.
    """
    machine = {"cpu": _processor(), "device": _device_name(device), "torch": torch.__version__}
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
            "sizes": sizes,
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


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA device, and torch sees none; use --device cpu.")
    return torch.cuda.get_device_name()


def _in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run, task).result()
        except Exception as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise RuntimeError(f"The process that measures {task['method']} failed: {cause}") from error


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Measure one method in this process, which must be a fresh one: its peak counts memory above the features."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    sizes, device, count = task["sizes"], torch.device(task["device"]), task["queries"]
    features = make_features(sizes, device)
    features = replace(features, query=features.query[:count], q_pids=features.q_pids[:count])
    outcomes = []
    (cost,) = measure(
        {"": lambda: outcomes.append(METHODS[task["method"]].run(features, sizes, task["precision"]))},
        repeats=task["repeats"],
        device=device,
        warm_up=device.type == "cuda",
    ).values()
    outcome = outcomes[-1]
    answer = {
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "peak_mb": cost.peak_mib * 2**20 / 1e6,
        "threads": torch.get_num_threads(),
        "metrics": outcome or {},
    }
    if isinstance(outcome, RetrievalResult):
        answer["metrics"] = outcome.metrics
        answer["per_query"] = {name: getattr(outcome, name).tolist() for name in ("ap", "inp", "first_rank")}
    return answer


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
