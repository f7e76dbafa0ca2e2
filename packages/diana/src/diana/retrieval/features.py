"""What images and dialogues have in common once they are encoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tbps_common.ranking.memory import is_out_of_memory, release_cached_memory

Items = TypeVar("Items", bound=Any)
Result = TypeVar("Result")

SIM_DTYPES = ("fp32", "native")


def finished(features: Tensor, sim_dtype: str) -> Tensor:
    """Unit-norm features on the CPU.

    Args:
        features: `[..., D]`.
        sim_dtype: `fp32` raises them to float32 first; `native` keeps the model's dtype, as the released code does.
    """
    if sim_dtype == "fp32":
        features = features.float()
    return F.normalize(features, dim=-1).cpu()


def in_halves(run: Callable[[Items], Result], items: Items) -> list[Result]:
    """`run(items)`, or its results on ever smaller halves of the list or tensor where memory runs out.

    Raises:
        Exception: a single item does not fit either, or anything but a lack of memory happened.
    """
    try:
        return [run(items)]
    except Exception as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    # Outside the handler: the exception would keep the tensors of the failed batch alive.
    release_cached_memory()
    middle = len(items) // 2
    return [*in_halves(run, items[:middle]), *in_halves(run, items[middle:])]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients, and back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
