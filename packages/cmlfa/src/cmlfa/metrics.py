"""Evaluation: features of both sides in the loaders' own batches, then the retrieval metrics of tbps_common."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from prettytable import PrettyTable
from torch import Tensor

from tbps_common.ranking import RetrievalResult, rank, retrieve
from tbps_common.run.progress import progress_bar

__all__ = ["METRICS", "EvaluationStopped", "Evaluator", "metrics_table", "rank"]

METRICS = ("R1", "R5", "R10", "mAP", "mINP")

Batches = Iterable[tuple[Tensor, Tensor]]


class EvaluationStopped(Exception):
    """The process was asked to stop while it evaluated."""


class Evaluator:
    """Text-to-image (and image-to-text) retrieval over two loaders.

    The released model's features depend on the batches they are computed in, so the loaders' batch size and order are
    part of the result.

    Args:
        img_loader: iterable of (pids `[B]`, images `[B, 3, H, W]`).
        txt_loader: iterable of (pids `[B]`, token ids `[B, L]`).
    """

    def __init__(self, img_loader: Batches, txt_loader: Batches):
        self.img_loader = img_loader
        self.txt_loader = txt_loader
        self.logger = logging.getLogger("IRRA.eval")

    @torch.no_grad()
    def compute_embedding(
        self, model: Any, *, stop_requested: Callable[[], bool] = lambda: False, progress: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode all captions, then all images, in the loaders' order, in evaluation mode.

        Args:
            model: a CMLFA model; its mode is left as it was.
            stop_requested: asked before every batch.
            progress: show how far each side is; the loaders must have a length.

        Returns:
            Caption features `[Q, D]` and image features `[G, D]` (float32, not normalised, on the model's device), and
            the person ids `[Q]` and `[G]` on the CPU.

        Raises:
            EvaluationStopped: `stop_requested` said yes.
        """
        device = next(model.parameters()).device

        def encode_all(loader: Any, encode: Callable[[Tensor], Tensor], label: str) -> tuple[Tensor, Tensor]:
            features, ids = [], []
            with progress_bar(len(loader) if progress else 0, unit="batch", desc=label, enabled=progress) as bar:
                for pids, batch in loader:
                    if stop_requested():
                        raise EvaluationStopped
                    features.append(encode(batch.to(device, non_blocking=True)))
                    ids.append(pids.reshape(-1))
                    bar.update()
            return torch.cat(features), torch.cat(ids)

        training = model.training
        model.eval()
        try:
            qfeats, qids = encode_all(self.txt_loader, model.encode_text, "captions")
            gfeats, gids = encode_all(self.img_loader, model.encode_image, "images")
        finally:
            model.train(training)
        return qfeats, gfeats, qids, gids

    def retrieve(
        self, model: Any, i2t_metric: bool = False, *, max_rank: int = 10, **watching: Any
    ) -> dict[str, RetrievalResult]:
        """Rank by cosine similarity: `t2i`, and with `i2t_metric` also `i2t`.

        Args:
            model: a CMLFA model.
            i2t_metric: rank the captions for every image too.
            max_rank: length of the CMC curves.
            **watching: `stop_requested` and `progress` of `compute_embedding`.

        Raises:
            EvaluationStopped: `stop_requested` said yes.
            ValueError: a query without a positive, or features that are not finite.
        """
        qfeats, gfeats, qids, gids = self.compute_embedding(model, **watching)
        qfeats, gfeats = F.normalize(qfeats, dim=1), F.normalize(gfeats, dim=1)
        results = {"t2i": retrieve(qfeats, gfeats, qids, gids, max_rank=max_rank)}
        if i2t_metric:
            results["i2t"] = retrieve(gfeats, qfeats, gids, qids, max_rank=max_rank)
        return results

    def evaluate(self, model: Any, i2t_metric: bool = False) -> dict[str, dict[str, float]]:
        """Percentages `R1`, `R5`, `R10`, `mAP`, `mINP` of `t2i` (and `i2t`), also logged as a table."""
        results = self.retrieve(model, i2t_metric)
        self.logger.info("\n%s", metrics_table(results))
        return {task: {name: float(result.metrics[name]) for name in METRICS} for task, result in results.items()}

    def eval(self, model: Any, i2t_metric: bool = False) -> float:
        """Rank-1 accuracy of text-to-image retrieval in percent; the table is logged."""
        return self.evaluate(model, i2t_metric)["t2i"]["R1"]


def metrics_table(results: dict[str, RetrievalResult]) -> str:
    """The table the released code prints: one row per task, three decimals."""
    table = PrettyTable(["task", *METRICS])
    for task, result in results.items():
        table.add_row([task, *(f"{result.metrics[name]:.3f}" for name in METRICS)])
    return table.get_string()
