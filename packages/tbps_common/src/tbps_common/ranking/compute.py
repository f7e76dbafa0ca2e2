"""How products are computed: in exactly the precision that was asked for, and on as many threads as torch uses."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tbps_common.ranking.inputs import check_choice

Precision = Literal["highest", "tf32", "bfloat16"]
PRECISIONS = ("highest", "tf32", "bfloat16")

Task = TypeVar("Task")


def compute_dtype(query: torch.dtype, gallery: torch.dtype, precision: str) -> torch.dtype:
    """The dtype of products and scores: float64 when either side has it (never under bfloat16), else float32."""
    check_choice(precision, "precision", PRECISIONS)
    return torch.float64 if torch.float64 in (query, gallery) and precision != "bfloat16" else torch.float32


def operand(features: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """Features as the product reads them; the tensor itself where nothing has to change.

    Under bfloat16 the values are rounded to bfloat16 and kept in float32. Such products are exact in float32 and in
    TF32 (8 of 24 and of 11 significant bits), so the sum is a float32 accumulation of bfloat16 products on any device.
    """
    if precision == "bfloat16":
        features = features.to(torch.bfloat16)
    return features.to(dtype)


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Run matrix products in exactly this precision: no gradients, no autocast, TF32 as asked, restored afterwards."""
    # The per-backend setting replaced the process-wide name in torch 2.9, and reading one after writing the other fails.
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn]
    backends = [getattr(backend, "matmul", backend) for backend in backends]
    by_backend = all(hasattr(backend, "fp32_precision") for backend in backends)
    before = [backend.fp32_precision for backend in backends] if by_backend else torch.get_float32_matmul_precision()
    try:
        if by_backend:
            for backend in backends:
                backend.fp32_precision = "ieee" if precision == "highest" else "tf32"
        else:
            torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if by_backend:
            for backend, value in zip(backends, before):
                backend.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(str(before))


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ranking")


def run_all(function: Callable[[Task], None], tasks: Sequence[Task]) -> None:
    """Call `function` on every task, in parallel when torch has more than one thread; the first error is raised.

    For work on NumPy arrays: NumPy releases the interpreter lock inside its loops.
    """
    workers = torch.get_num_threads()
    for _ in map(function, tasks) if workers == 1 or len(tasks) == 1 else _pool(workers).map(function, tasks):
        pass
