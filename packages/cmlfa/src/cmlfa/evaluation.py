"""Evaluation that can be interrupted: features in the loaders' own batches, then the shared ranking."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from cmlfa.metrics import Evaluator, metrics_table
from tbps_common.ranking import RetrievalResult, retrieve

__all__ = ["EvaluationStopped", "evaluate", "metrics_table"]


class EvaluationStopped(Exception):
    """The process was asked to stop while it evaluated."""


def evaluate(
    model: Any,
    image_loader: Iterable[tuple[Tensor, Tensor]],
    text_loader: Iterable[tuple[Tensor, Tensor]],
    *,
    i2t: bool = False,
    max_rank: int = 10,
    stop_requested: Callable[[], bool] | None = None,
    progress: bool = False,
) -> dict[str, RetrievalResult]:
    """Text-to-image retrieval (and the reverse) by cosine similarity.

    The features are computed in the batches of the loaders: with `lfa_attention="batch"` they depend on them.

    Args:
        model: a CMLFA model; its mode is left as it was.
        image_loader: batches (pids `[B]`, images `[B, 3, H, W]`).
        text_loader: batches (pids `[B]`, token ids `[B, L]`).
        i2t: rank the captions for every image too.
        max_rank: length of the CMC curves.
        stop_requested: asked before every batch.
        progress: show a progress bar for each side where stderr is a terminal.

    Returns:
        Results of the tasks `t2i` and, if asked for, `i2t`.

    Raises:
        EvaluationStopped: `stop_requested` said yes.
        ValueError: a query without a positive, or features that are not finite numbers.
    """
    evaluator = Evaluator(
        _watched(image_loader, "images", stop_requested, progress),
        _watched(text_loader, "captions", stop_requested, progress),
    )
    queries, gallery, query_ids, gallery_ids = evaluator.compute_embedding(model)
    queries, gallery = normalize(queries, dim=1), normalize(gallery, dim=1)
    results = {"t2i": retrieve(queries, gallery, query_ids, gallery_ids, max_rank=max_rank)}
    if i2t:
        results["i2t"] = retrieve(gallery, queries, gallery_ids, query_ids, max_rank=max_rank)
    return results


def _watched(
    loader: Iterable[tuple[Tensor, Tensor]], label: str, stop_requested: Callable[[], bool] | None, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    from tqdm import tqdm

    for batch in tqdm(loader, desc=label, unit="batch", leave=False, disable=None if progress else True):
        if stop_requested is not None and stop_requested():
            raise EvaluationStopped
        yield batch
