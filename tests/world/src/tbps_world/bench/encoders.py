"""What an export costs in accuracy: a test set encoded by torch, by onnxruntime, and by its 8-bit files, on the CPU."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable
from torch import Tensor

from tbps_common.models.export import open_encoder
from tbps_common.models.hub import Encoder
from tbps_common.ranking import retrieve

Batches = Sequence[tuple[Tensor, ...]]
"""Inputs of an encoder, batch by batch."""


@torch.no_grad()
def compare_encoders(
    encoders: Sequence[Encoder],
    onnx: Path,
    inputs: Sequence[Batches],
    gallery_ids: Any,
    query_ids: Any,
    **similarity: Any,
) -> str:
    """A table with R@1 and mAP of each form, the queries that it loses at R@1, and its time beside torch's.

    Args:
        encoders: of the gallery and of the queries (`encoders` of a package's `convert`).
        onnx: folder that `tbps-model export --onnx --int8` wrote.
        inputs: of the two encoders.
        gallery_ids: who is in each picture.
        query_ids: who is asked for.
        **similarity: `reduce` and `k` of `tbps_common.ranking.retrieve`.
    """
    table = PrettyTable(["encoders", "R@1", "mAP", "queries lost at R@1", "time / torch's"], align="r")
    first: tuple[float, float] | None = None
    for name, ending in (("torch", None), ("onnx", ".onnx"), ("onnx, int8", ".int8.onnx")):
        forms = [_in_torch(one) if ending is None else open_encoder(onnx / f"{one.name}{ending}") for one in encoders]
        started = time.perf_counter()
        gallery, queries = (torch.cat([run(*batch) for batch in part]) for run, part in zip(forms, inputs))
        seconds = time.perf_counter() - started
        result = retrieve(queries, gallery, query_ids, gallery_ids, **similarity)
        first = first or (seconds, result.metrics["R1"])
        lost = round((first[1] - result.metrics["R1"]) / 100 * result.num_queries)
        row = [f"{result.metrics['R1']:.3f}", f"{result.metrics['mAP']:.3f}", lost, f"{seconds / first[0]:.2f}"]
        table.add_row([name, *row])
    return f"{len(query_ids)} queries, {len(gallery_ids)} pictures\n{table}"


def _in_torch(encoder: Encoder) -> Callable[..., Tensor]:
    return lambda *inputs: encoder.call(encoder.model, *inputs)
