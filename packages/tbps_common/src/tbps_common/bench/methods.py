"""The ways to the metrics that are compared. Each takes features and returns per-query values or metrics.

All but `ours` are written the way they are commonly used, not to be slow: the naive form uses one product, `topk` and one
`argsort` over everything.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tbps_common.bench.catalogue import BROADCAST_IMAGES
from tbps_common.bench.data import Features
from tbps_common.bench.presets import Sizes

TOPK = 10
TOKENS_AVERAGED = 6
_PRODUCT_BYTES = 1 << 24


@dataclass(frozen=True)
class Outcome:
    """What a method found; `None` where it does not compute something.

    Attributes:
        metrics: in percent, among `R1 R5 R10 mAP mINP`.
        ap: `[Q]` fractions, for the average over fewer queries.
        inp: `[Q]` fractions.
        first_rank: `[Q]`, 1-based.
    """

    metrics: dict[str, float]
    ap: Tensor | None = None
    inp: Tensor | None = None
    first_rank: Tensor | None = None


def product(features: Features, sizes: Sizes, precision: str) -> None:
    """The bare matrix products into a reused buffer: what no exact method can do without."""
    from tbps_common.ranking.compute import operand, products

    with products(precision, features.query.device):
        query = operand(features.query, torch.float32, precision)
        gallery = features.gallery
        if sizes.reduce.startswith("attr_") and sizes.reduce != "attr_avg":
            for attribute in range(sizes.tokens):
                _blocked_product(query[:, attribute], gallery[:, attribute], precision)
        else:
            _blocked_product(
                query.flatten(1) if gallery.dim() == query.dim() else query,
                gallery.reshape(-1, query.flatten(1).shape[1]),
                precision,
            )


def _blocked_product(query: Tensor, gallery: Tensor, precision: str) -> None:
    from tbps_common.ranking.compute import operand

    step = max(64, _PRODUCT_BYTES // (4 * len(query)))
    scratch = query.new_empty(step, len(query))
    for start in range(0, len(gallery), step):
        block = operand(gallery[start : start + step], torch.float32, precision)
        torch.mm(block, query.t(), out=scratch[: len(block)])


def ours(features: Features, sizes: Sizes, precision: str) -> Outcome:
    from tbps_common.ranking import retrieve

    result = retrieve(
        features.query,
        features.gallery,
        features.q_pids,
        features.g_pids,
        reduce=sizes.reduce,
        k=TOKENS_AVERAGED,
        topk=TOPK,
        precision=precision,  # pyright: ignore[reportArgumentType] - the parser allows only known names
    )
    return Outcome(result.metrics, result.ap, result.inp, result.first_rank)


def naive(features: Features, sizes: Sizes, precision: str) -> Outcome:
    """Everything at once: all scores of all tokens, `topk` over the tokens, `argsort` over the gallery."""
    from tbps_common.ranking.compute import operand, products

    device = features.query.device
    with products(precision, device):
        query, gallery = (operand(x, torch.float32, precision) for x in (features.query, features.gallery))
        scores = _all_scores(query, gallery, sizes)
    return _by_argsort(scores, features.q_pids.to(device), features.g_pids.to(device))


def _all_scores(query: Tensor, gallery: Tensor, sizes: Sizes) -> Tensor:
    if sizes.reduce == "dot":
        return query @ gallery.t()
    if sizes.reduce.startswith("attr_"):
        query, gallery = (x / x.norm(dim=2, keepdim=True).clamp(min=1e-8) for x in (query, gallery))
        cosine = torch.einsum("qkc,gkc->qgk", query, gallery)
        return {
            "attr_avg": lambda: cosine.mean(2),
            "attr_max": lambda: cosine.amax(2),
            "attr_min": lambda: cosine.amin(2),
            "attr_lsp_max": lambda: cosine.logsumexp(2),
            "attr_lsp_min": lambda: -(-cosine).logsumexp(2),
        }[sizes.reduce]()
    every = (query @ gallery.flatten(0, 1).t()).view(len(query), len(gallery), -1)
    return _reduce_tokens(every, sizes)


def _reduce_tokens(every: Tensor, sizes: Sizes) -> Tensor:
    if sizes.reduce == "topk_mean":
        return every.topk(min(TOKENS_AVERAGED, sizes.tokens), dim=2).values.mean(2)
    return {"max": every.amax, "mean": every.mean, "logsumexp": every.logsumexp}[sizes.reduce](2)


def broadcast(features: Features, sizes: Sizes, precision: str) -> Outcome:
    """The token products as the released FAFA code forms them: a vector by matrix product for every pair."""
    blocks = []
    query = features.query[:, None, None, :]
    for start in range(0, len(features.gallery), BROADCAST_IMAGES):
        images = features.gallery[start : start + BROADCAST_IMAGES].permute(0, 2, 1)
        blocks.append(_reduce_tokens(torch.matmul(query, images).squeeze(2), sizes))
    return _by_argsort(torch.cat(blocks, dim=1), features.q_pids, features.g_pids)


def _by_argsort(scores: Tensor, q_pids: Tensor, g_pids: Tensor) -> Outcome:
    order = torch.argsort(scores, dim=1, descending=True)
    match = g_pids[order] == q_pids[:, None]
    place = torch.arange(1, match.shape[1] + 1, device=match.device)
    found = match.cumsum(dim=1)
    total = found[:, -1]
    ap = (found * match / place).sum(dim=1, dtype=torch.float64) / total
    last = (match * place).amax(dim=1)
    first = match.int().argmax(dim=1) + 1
    inp = total.double() / last
    metrics = {f"R{k}": 100.0 * (first <= k).double().mean().item() for k in (1, 5, 10)}
    metrics |= {"mAP": 100.0 * ap.mean().item(), "mINP": 100.0 * inp.mean().item()}
    return Outcome(metrics)


def with_torchmetrics(features: Features, sizes: Sizes, precision: str) -> Outcome:
    """All pairs as one long list, grouped by query: the form torchmetrics wants."""
    retrieval = importlib.import_module("torchmetrics.retrieval")
    scores = _all_scores(features.query, features.gallery, sizes)
    # torchmetrics 1.9 takes positives with a score of 0 or less for absent; a shift does not change the order.
    scores = (scores - scores.min() + 1.0).flatten()
    target = (features.q_pids[:, None] == features.g_pids).flatten()
    groups = torch.arange(len(features.query)).repeat_interleave(len(features.gallery))
    metrics = {"mAP": 100.0 * float(retrieval.RetrievalMAP()(scores, target, indexes=groups))}
    for k in (1, 5, 10):
        metrics[f"R{k}"] = 100.0 * float(retrieval.RetrievalHitRate(top_k=k)(scores, target, indexes=groups))
    return Outcome(metrics)


def with_faiss(features: Features, sizes: Sizes, precision: str) -> Outcome:
    """An exact inner-product index; it returns the best positions only, so there is no mAP and no mINP."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(sizes.dim)
    index.add(features.gallery.numpy())
    _, best = index.search(features.query.numpy(), TOPK)
    match = features.g_pids[torch.from_numpy(best)] == features.q_pids[:, None]
    return Outcome({f"R{k}": 100.0 * match[:, :k].any(dim=1).double().mean().item() for k in (1, 5, 10)})


def with_pml(features: Features, sizes: Sizes, precision: str) -> Outcome:
    """pytorch-metric-learning's calculator with every gallery image as a neighbour."""
    distances = importlib.import_module("pytorch_metric_learning.distances")
    accuracy = importlib.import_module("pytorch_metric_learning.utils.accuracy_calculator")
    inference = importlib.import_module("pytorch_metric_learning.utils.inference")
    calculator = accuracy.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision"),
        k=len(features.gallery),
        device=torch.device("cpu"),
        knn_func=inference.CustomKNN(distances.DotProductSimilarity(normalize_embeddings=False)),
    )
    found = calculator.get_accuracy(features.query, features.q_pids, features.gallery, features.g_pids)
    return Outcome({"R1": 100.0 * found["precision_at_1"], "mAP": 100.0 * found["mean_average_precision"]})


RUN: dict[str, Callable[[Features, Sizes, str], Outcome | None]] = {
    "gemm": product,
    "ours": ours,
    "naive": naive,
    "broadcast": broadcast,
    "torchmetrics": with_torchmetrics,
    "faiss": with_faiss,
    "pml": with_pml,
}
