"""Evaluation: features of both sides, then the retrieval metrics of tbps_common."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbps_common.ranking import RetrievalResult, rank, retrieve

__all__ = ["METRICS", "Evaluator", "rank"]

METRICS = ("R1", "R5", "R10", "mAP", "mINP")


class Evaluator:
    """Text-to-image (and image-to-text) retrieval over two loaders.

    The released model's features depend on the batches they are computed in, so the loaders' batch size and order are
    part of the result.

    Args:
        img_loader: iterable of (pids `[B]`, images `[B, 3, H, W]`).
        txt_loader: iterable of (pids `[B]`, token ids `[B, L]`).
    """

    def __init__(self, img_loader: Iterable[tuple[Tensor, Tensor]], txt_loader: Iterable[tuple[Tensor, Tensor]]):
        self.img_loader = img_loader
        self.txt_loader = txt_loader
        self.logger = logging.getLogger("IRRA.eval")

    @torch.no_grad()
    def compute_embedding(self, model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode all captions, then all images, in the loaders' order, in evaluation mode.

        Returns:
            Caption features `[Q, D]` and image features `[G, D]` (float32, not normalised, on the model's device), and
            the person ids `[Q]` and `[G]` on the CPU.
        """
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            qfeats, qids = _encode_all(self.txt_loader, model.encode_text, device)
            gfeats, gids = _encode_all(self.img_loader, model.encode_image, device)
        finally:
            model.train(training)
        return qfeats, gfeats, qids, gids

    def retrieve(self, model: Any, i2t_metric: bool = False) -> dict[str, RetrievalResult]:
        """Rank by cosine similarity: `t2i`, and with `i2t_metric` also `i2t`.

        Raises:
            ValueError: a query without a positive, or features that are not finite.
        """
        qfeats, gfeats, qids, gids = self.compute_embedding(model)
        qfeats, gfeats = F.normalize(qfeats, dim=1), F.normalize(gfeats, dim=1)
        results = {"t2i": retrieve(qfeats, gfeats, qids, gids)}
        if i2t_metric:
            results["i2t"] = retrieve(gfeats, qfeats, gids, qids)
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
    from prettytable import PrettyTable

    table = PrettyTable(["task", *METRICS])
    for task, result in results.items():
        table.add_row([task, *(f"{result.metrics[name]:.3f}" for name in METRICS)])
    return table.get_string()


def _encode_all(loader: Iterable[tuple[Tensor, Tensor]], encode: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    features, ids = [], []
    for pids, batch in loader:
        features.append(encode(batch.to(device, non_blocking=True)))
        ids.append(pids.reshape(-1))
    return torch.cat(features), torch.cat(ids)
