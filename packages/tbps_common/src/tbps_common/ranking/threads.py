"""Work on NumPy arrays spread over as many threads as torch uses; NumPy releases the interpreter lock inside loops."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Task = TypeVar("Task")


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ranking")


def run_all(function: Callable[[Task], None], tasks: Iterable[Task]) -> None:
    """Call `function` on every task, in parallel when torch has more than one thread; the first error is raised."""
    tasks = list(tasks)
    workers = torch.get_num_threads()
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            function(task)
    else:
        for _ in _pool(workers).map(function, tasks):
            pass
