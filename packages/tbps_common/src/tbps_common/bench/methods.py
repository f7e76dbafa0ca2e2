"""The features, and the ways to the metrics that are compared.

All but `ours` are written the way they are commonly used, not to be slow: the naive form uses one product, `topk` and one
`argsort` over everything.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tbps_common.bench.sizes import Sizes
from tbps_common.ranking import RetrievalResult, retrieve
from tbps_common.ranking.compute import operand, products

Metrics = dict[str, float]
"""In percent, those of `R1 R5 R10 mAP mINP` that a method computes."""

SEED = 20250711
TOPK = 10
TOKENS_AVERAGED = 6
BROADCAST_IMAGES = 500  # in one block, as in the released FAFA code
_PRODUCT_BYTES = 1 << 24
_CHUNK_ELEMENTS = 1 << 24
# Tokens of an image that show its person; the others are noise.
_TELLING_TOKENS = 8
_DISTANCE = 4.5


@dataclass(frozen=True)
class Features:
    """Features and identities as `retrieve` takes them."""

    query: Tensor
    gallery: Tensor
    q_pids: Tensor
    g_pids: Tensor


def make_features(sizes: Sizes, device: torch.device) -> Features:
    """Unit vectors around one random direction for each identity; each identity has `positives` gallery images.

    The noise is such that the ranking is neither perfect nor chance.
    """
    generator = torch.Generator().manual_seed(SEED)
    g_pids = _gallery_ids(sizes, generator)
    q_pids = g_pids[torch.randint(len(g_pids), (sizes.queries,), generator=generator)]
    attributes = sizes.reduce.startswith("attr_")
    per_identity = (sizes.tokens, sizes.dim) if attributes else (sizes.dim,)
    centres = normalize(torch.randn(int(g_pids.max()) + 1, *per_identity, generator=generator), dim=-1)
    # Standard deviations of a stranger's inner product by which a positive stands out. Averages over attributes or the
    # best tokens have a smaller deviation, so less is enough.
    distance = _DISTANCE if sizes.reduce == "dot" else _DISTANCE / math.sqrt(min(sizes.tokens, _TELLING_TOKENS))
    noise = math.sqrt(max(0.05, math.sqrt(sizes.dim) / distance - 1))
    query = _around(centres, q_pids, per_identity, noise, None, generator)
    shape = per_identity if sizes.reduce == "dot" else (sizes.tokens, sizes.dim)
    telling = None if attributes or sizes.reduce == "dot" else _TELLING_TOKENS
    gallery = _around(centres, g_pids, shape, noise, telling, generator)
    return Features(query.to(device), gallery.to(device), q_pids, g_pids)


def _gallery_ids(sizes: Sizes, generator: torch.Generator) -> Tensor:
    low, high = sizes.positives
    counts = torch.randint(low, high + 1, (sizes.gallery // low + 1,), generator=generator)
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts)[: sizes.gallery]
    return ids[torch.randperm(sizes.gallery, generator=generator)]


def _around(
    centres: Tensor, ids: Tensor, shape: tuple[int, ...], noise: float, telling: int | None, generator: torch.Generator
) -> Tensor:
    features = torch.empty(len(ids), *shape)
    step = max(1, _CHUNK_ELEMENTS // features[0].numel())
    for start in range(0, len(ids), step):
        part = features[start : start + step].normal_(generator=generator).mul_(noise / math.sqrt(shape[-1]))
        own = centres[ids[start : start + step]]
        if telling is None:
            part += own
        else:
            part[:, :telling] += own.unsqueeze(1)
        part.div_(part.norm(dim=-1, keepdim=True))
    return features


def product(features: Features, sizes: Sizes, precision: str) -> None:
    """The bare matrix products into a reused buffer: what no exact method can do without."""
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
    step = max(64, _PRODUCT_BYTES // (4 * len(query)))
    scratch = query.new_empty(step, len(query))
    for start in range(0, len(gallery), step):
        block = operand(gallery[start : start + step], torch.float32, precision)
        torch.mm(block, query.t(), out=scratch[: len(block)])


def ours(features: Features, sizes: Sizes, precision: str) -> RetrievalResult:
    return retrieve(
        features.query,
        features.gallery,
        features.q_pids,
        features.g_pids,
        reduce=sizes.reduce,
        k=TOKENS_AVERAGED,
        topk=TOPK,
        precision=precision,  # pyright: ignore[reportArgumentType] - the parser allows only known names
    )


def naive(features: Features, sizes: Sizes, precision: str) -> Metrics:
    """Everything at once: all scores of all tokens, `topk` over the tokens, `argsort` over the gallery."""
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


def broadcast(features: Features, sizes: Sizes, precision: str) -> Metrics:
    """The token products as the released FAFA code forms them: a vector by matrix product for every pair."""
    blocks = []
    query = features.query[:, None, None, :]
    for start in range(0, len(features.gallery), BROADCAST_IMAGES):
        images = features.gallery[start : start + BROADCAST_IMAGES].permute(0, 2, 1)
        blocks.append(_reduce_tokens(torch.matmul(query, images).squeeze(2), sizes))
    return _by_argsort(torch.cat(blocks, dim=1), features.q_pids, features.g_pids)


def _by_argsort(scores: Tensor, q_pids: Tensor, g_pids: Tensor) -> Metrics:
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
    return metrics


def with_torchmetrics(features: Features, sizes: Sizes, precision: str) -> Metrics:
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
    return metrics


def with_faiss(features: Features, sizes: Sizes, precision: str) -> Metrics:
    """An exact inner-product index; it returns the best positions only, so there is no mAP and no mINP."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(sizes.dim)
    index.add(features.gallery.numpy())
    _, best = index.search(features.query.numpy(), TOPK)
    match = features.g_pids[torch.from_numpy(best)] == features.q_pids[:, None]
    return {f"R{k}": 100.0 * match[:, :k].any(dim=1).double().mean().item() for k in (1, 5, 10)}


def with_pml(features: Features, sizes: Sizes, precision: str) -> Metrics:
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
    return {"R1": 100.0 * found["precision_at_1"], "mAP": 100.0 * found["mean_average_precision"]}


METHODS: dict[str, Callable[[Features, Sizes, str], Metrics | RetrievalResult | None]] = {
    "gemm": product,
    "ours": ours,
    "naive": naive,
    "broadcast": broadcast,
    "torchmetrics": with_torchmetrics,
    "faiss": with_faiss,
    "pml": with_pml,
}
"""`gemm`, the bare product, and `ours` always run; the others are chosen with `--against`."""

LIBRARIES = {"torchmetrics": ("torchmetrics",), "faiss": ("faiss",), "pml": ("pytorch_metric_learning", "faiss")}
"""Import names of the optional libraries a method needs."""


def fits(method: str, sizes: Sizes) -> bool:
    """Whether a method can score this kind of features."""
    if method == "broadcast":
        return sizes.tokens > 1 and not sizes.reduce.startswith("attr_")
    return sizes.reduce == "dot" or method not in ("faiss", "pml")


def bytes_per_query(method: str, sizes: Sizes) -> int:
    """Working memory that grows with the queries; 0 where it does not."""
    # Scores, int64 order and the sort's copies, identities in order, matches, their running sum and its products; and
    # one score for every token before the reduction.
    naive_bytes = 60 + (4 * sizes.tokens if sizes.tokens > 1 else 0)
    return sizes.gallery * {"naive": naive_bytes, "torchmetrics": naive_bytes + 20, "pml": 100}.get(method, 0)


def most_queries(method: str, sizes: Sizes, memory: float) -> int:
    """Queries worth running in so many bytes; the rest of the cost is proportional."""
    needed = bytes_per_query(method, sizes)
    limit = memory // needed if needed else sizes.queries
    if method == "broadcast":
        limit = (1 << 32) // (sizes.gallery * sizes.tokens * sizes.dim)
    return max(1, min(sizes.queries, int(limit)))
