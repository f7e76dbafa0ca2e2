"""The evaluation file that every package writes: one JSON object, so that numbers can be compared and collected.

    {
      "schema": "tbps-evaluation/1",
      "package": "cmlfa",                         which paper's code measured
      "dataset": "CUHK-PEDES", "split": "test",
      "metrics": {"t2i": {"R1": 73.4, "R5": 89.9, "R10": 93.7, "mAP": 66.1, "mINP": 50.2}},
      "counts": {"queries": 6156, "gallery": 3074},
      "settings": {"batch_size": 512, "lfa_attention": "batch"},
      "checkpoint": "logs/.../best.pth",          or null
      "fingerprint": "<64 hexadecimal digits>",   of weights and settings, or null
      "cmc": {"t2i": [73.4, 80.1, ...]},          R@1, R@2, ..., or null
      "published": [{"task": "t2i", "source": "...", "weights": "...", "protocol": "...",
                     "metrics": {"R1": {"published": 73.38, "difference": 0.02, "queries": 1}}}],
                                                  rows of published tables for this data set and size, or null
      "seconds": 12.5,                            wall time of the evaluation, or null
      "environment": {"python": "3.12.3", "torch": "2.9.0", "platform": "Linux-x86_64", "device": "cpu"}
    }

`metrics` has one entry per task (`t2i`: text finds image, `i2t` the reverse, ...). All metrics are percentages except
`mFR`, the mean 0-based rank of the first correct image. `settings` holds the flags that decide the numbers. The file
carries no date: two runs that measure the same write the same file, but for `seconds`.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.report.published import PublishedRow, compare_with_published

if TYPE_CHECKING:
    from tbps_common.ranking import RetrievalResult

SCHEMA = "tbps-evaluation/1"

_NOT_PERCENT = frozenset({"mFR"})
# A mean of float32 percentages may exceed 100 by its rounding.
_PERCENT_LIMIT = 100.001


def write_evaluation(
    path: str | os.PathLike[str],
    *,
    package: str,
    dataset: str,
    split: str,
    metrics: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
    cmc: Mapping[str, Sequence[float]] | None = None,
    published: Sequence[PublishedRow] = (),
    seconds: float | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Write one evaluation as JSON (fields: see the module), whole or not at all.

    Args:
        path: target file.
        package: import name of the measuring package.
        dataset: name of the data set.
        split: `test`, `val`, ...
        metrics: task -> metric -> value in percent (`mFR`: mean 0-based rank).
        counts: `queries` and `gallery` of the first task; further counts are kept.
        settings: flags that decide the numbers, as JSON can hold them (tuples become lists).
        checkpoint: path of the evaluated file, as the user gave it.
        fingerprint: `tbps_common.run.checkpoint.fingerprint` of the model.
        cmc: task -> R@1, R@2, ... in percent.
        published: all rows of the package; those that belong to this data set and size are compared.
        seconds: wall time of the evaluation.
        device: where it ran; by default the GPU's name if CUDA is in use, else `cpu`.

    Returns:
        The object as written.

    Raises:
        ValueError: a field does not fit the schema (NaN metrics, percentages out of range, missing counts).
        TypeError: a setting is nothing JSON can hold.
    """
    compared = compare_with_published(published, dataset=dataset, split=split, metrics=metrics, counts=counts)
    document = {
        "schema": SCHEMA,
        "package": package,
        "dataset": dataset,
        "split": split,
        "metrics": {task: {name: float(value) for name, value in row.items()} for task, row in metrics.items()},
        "counts": {name: int(count) for name, count in counts.items()},
        "settings": json.loads(json.dumps(dict(settings), allow_nan=False)),
        "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
        "fingerprint": fingerprint,
        "cmc": None if cmc is None else {task: [float(value) for value in curve] for task, curve in cmc.items()},
        "published": compared or None,
        "seconds": None if seconds is None else float(seconds),
        "environment": _environment(device),
    }
    _check(document, f"The evaluation for {os.fspath(path)}")
    write_json(path, document)
    return document


def evaluation_from_result(
    path: str | os.PathLike[str],
    results: "Mapping[str, RetrievalResult]",
    *,
    gallery: int,
    **more: Any,
) -> dict[str, Any]:
    """`write_evaluation` with metrics, CMC curves and counts taken from `tbps_common.ranking` results.

    Args:
        path: target file.
        results: task -> result; the first task gives the counts.
        gallery: number of gallery items of the first task.
        **more: the remaining arguments of `write_evaluation`.

    Returns:
        The object as written.
    """
    first = next(iter(results.values()))
    counts = {"queries": first.num_queries, "gallery": gallery}
    if first.num_missing:
        counts["queries_without_positive"] = first.num_missing
    return write_evaluation(
        path,
        metrics={task: result.metrics for task, result in results.items()},
        counts=counts,
        cmc={task: result.cmc.tolist() for task, result in results.items()},
        **more,
    )


def read_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an evaluation file.

    Raises:
        InputError: the file is absent, not JSON, of another schema, or a field does not fit.
    """
    file = Path(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"Evaluation file {file} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"Evaluation file {file} is not valid JSON ({error}); write it again.") from error
    _check(document, f"The evaluation file {file}")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check(document: Any, where: str) -> None:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{where} is not of schema {SCHEMA} (found: {found!r}); write it with this version.")

    def require(holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise InputError(f"{where}: field {field!r} must be {wanted}.")

    for field in ("package", "dataset", "split"):
        require(isinstance(document.get(field), str) and document[field] != "", field, "a name")
    metrics = document.get("metrics") or {}
    require(isinstance(metrics, dict) and len(metrics) > 0, "metrics", "an object with one entry per task")
    for task, row in metrics.items():
        require(isinstance(row, dict) and len(row) > 0, f"metrics.{task}", "an object of numbers")
        for name, value in row.items():
            limit = math.inf if name in _NOT_PERCENT else _PERCENT_LIMIT
            require(_number_up_to(value, limit), f"metrics.{task}.{name}", "a finite number in its range")
    counts = document.get("counts") or {}
    require(isinstance(counts, dict) and {"queries", "gallery"} <= counts.keys(), "counts", "queries and gallery")
    for name, count in counts.items():
        require(type(count) is int and count >= 0, f"counts.{name}", "a whole number")
    for field in ("settings", "environment"):
        require(isinstance(document.get(field), dict), field, "an object")
    for field in ("checkpoint", "fingerprint"):
        require(document.get(field) is None or isinstance(document[field], str), field, "a text or null")
    seconds = document.get("seconds")
    require(seconds is None or _number_up_to(seconds, math.inf), "seconds", "a number or null")
    curves = document.get("cmc")
    require(curves is None or isinstance(curves, dict), "cmc", "an object with one list per task, or null")
    published = document.get("published")
    require(published is None or isinstance(published, list), "published", "a list of rows, or null")
    for task, curve in (curves or {}).items():
        fits = isinstance(curve, list) and all(_number_up_to(value, _PERCENT_LIMIT) for value in curve)
        require(fits, f"cmc.{task}", "a list of percentages")


def _number_up_to(value: Any, limit: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 <= value <= limit


def _environment(device: str | None) -> dict[str, str]:
    import torch

    if device is None:
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = torch.cuda.get_device_name() if in_use else "cpu"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": f"{platform.system()}-{platform.machine()}",
        "device": device,
    }
