"""One method in a process of its own: `python -m tbps_common.bench.worker TASK.json ANSWER.json`.

The peak counts memory above the features. On Linux the high-water mark is reset once the features exist; elsewhere the
process's own maximum is used, which can only be too small when making the features took more than the method.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tbps_common.files import write_json


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Measure `task["method"]`: best wall and CPU seconds of `task["repeats"]` calls, and the peak memory of all."""
    import torch

    from tbps_common.bench.data import Features, make_features
    from tbps_common.bench.methods import RUN
    from tbps_common.bench.presets import Sizes

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    sizes = Sizes(**{**task["sizes"], "positives": tuple(task["sizes"]["positives"])})
    device = torch.device(task["device"])
    features = make_features(sizes, device)
    count = task["queries"]
    features = Features(features.query[:count], features.gallery, features.q_pids[:count], features.g_pids)
    method = RUN[task["method"]]
    if device.type == "cuda":
        method(features, sizes, task["precision"])  # the first call makes handles and compiles kernels
    before = _reset_peak(device)
    walls, cpus, outcome = [], [], None
    for _ in range(task["repeats"]):
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = method(features, sizes, task["precision"])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    answer = {
        "wall_s": min(walls),
        "cpu_s": min(cpus),
        "peak_mb": max(0.0, (_peak(device) - before) / 1e6),
        "threads": torch.get_num_threads(),
        "metrics": {},
    }
    if outcome is not None:
        answer["metrics"] = outcome.metrics
        if outcome.ap is not None and outcome.inp is not None and outcome.first_rank is not None:
            answer["per_query"] = {
                "ap": outcome.ap.tolist(),
                "inp": outcome.inp.tolist(),
                "first_rank": outcome.first_rank.tolist(),
            }
    return answer


def _reset_peak(device: Any) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak(device)
    return _status("VmRSS")


def _peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return maximum if sys.platform == "darwin" else maximum * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


def main(argv: list[str]) -> int:
    write_json(argv[1], run(json.loads(Path(argv[0]).read_text(encoding="utf-8"))), indent=None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
