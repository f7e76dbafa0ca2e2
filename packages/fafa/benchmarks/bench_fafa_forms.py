"""What is compared at any size: the losses, a training step, and an evaluation."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench_fafa_direct import (
    direct_dispersion,
    direct_evaluation_similarity,
    direct_losses,
    direct_metrics,
    direct_token_similarity,
)
from bench_fafa_model import build_model, random_batch
from fafa.evaluation import retrieval, topk_mean_similarity
from fafa.losses import FeatureDispersionLoss, pool_tokens, token_similarity
from fafa.optim import build_optimizer
from tbps_common.bench.timer import difference, measure

Row = dict[str, Any]

K = 6


def unit(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Random rows of length one."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(device)


def milliseconds(forms: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """The fastest of `repeats` turns of each form."""
    return {name: cost.milliseconds for name, cost in measure(forms, repeats=repeats, device=device).items()}


def compared(
    what: str, direct: Callable[[], Any], ours: Callable[[], Any], repeats: int, device: torch.device, tolerance: float
) -> Row:
    """One row of the table: times of both forms and how far their results are apart.

    Raises:
        AssertionError: the results differ by more than `tolerance`; a saving that changes them is none.
    """
    apart = difference(direct(), ours())
    assert apart <= tolerance, f"{what}: the two forms differ by {apart:.3g}, more than {tolerance:.3g}"
    return {"what": what, **milliseconds({"direct": direct, "ours": ours}, repeats, device), "difference": apart}


def losses(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """FD and the similarity of FDA, forward and backward."""
    query = unit(args.batch_size, args.embed_dim, seed=args.seed, device=device)
    targets = unit(args.batch_size, args.query_tokens, args.embed_dim, seed=args.seed + 1, device=device)
    own = FeatureDispersionLoss(0.1)
    tokens = min(args.batch_size * args.query_tokens, own.sample_size)
    indices = torch.arange(tokens, device=device)
    k = min(K, args.query_tokens)

    def dispersion(form: Any) -> Any:
        def run() -> list[Tensor]:
            features = targets.clone().requires_grad_()
            loss = form(features)
            loss.backward()
            assert features.grad is not None
            return [loss.detach(), features.grad]

        return run

    def alignment(form: Any) -> Any:
        def run() -> list[Tensor]:
            features = targets.clone().requires_grad_()
            loss = pool_tokens(form(query, features), k).square().sum()
            loss.backward()
            assert features.grad is not None
            return [loss.detach() / args.batch_size, features.grad]

        return run

    return [
        compared(
            f"FD, {tokens} tokens, forward + backward, ms",
            dispersion(lambda features: direct_dispersion(features, 0.1, indices)),
            dispersion(lambda features: own(features, indices)),
            args.repeats,
            device,
            1e-5,
        ),
        compared(
            "FDA similarity, forward + backward, ms",
            alignment(direct_token_similarity),
            alignment(token_similarity),
            args.repeats,
            device,
            1e-4,
        ),
    ]


def training_step(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Whole steps of both forms on models that start equal; each keeps training, so only the first losses compare."""
    direct, ours = build_model(args, device), build_model(args, device)
    samples, draws = random_batch(args, ours)

    def backward(model: Any, forward: Any) -> Tensor:
        found = torch.stack(list(forward(model, samples, draws).values()))
        found.sum().backward()
        return found.detach()

    def call(model: Any, samples: Any, draws: Any) -> Any:
        return model(samples, draws)

    first = backward(direct, direct_losses), backward(ours, call)
    assert direct.query_tokens.grad is not None and ours.query_tokens.grad is not None
    scale = direct.query_tokens.grad.abs().max()
    apart = max(difference(*first), difference(direct.query_tokens.grad / scale, ours.query_tokens.grad / scale))
    assert apart <= 1e-3, f"losses or gradients of the two forms differ by {apart:.3g}"

    def step(model: Any, forward: Any) -> Any:
        optimizer = build_optimizer(model, 1e-6)

        def run() -> None:
            optimizer.zero_grad()
            backward(model, forward)
            optimizer.step()

        return run

    forms = {"direct": step(direct, direct_losses), "ours": step(ours, call)}
    return [{"what": "training step, ms", **milliseconds(forms, args.repeats, device), "difference": apart}]


def evaluation(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Features to similarities and to metrics."""
    tokens, width = (32, 256) if args.full_size else (args.query_tokens, args.embed_dim)
    query = unit(args.queries, width, seed=args.seed, device=device)
    gallery = unit(args.gallery, tokens, width, seed=args.seed + 1, device=device)
    persons = max(args.gallery // 2, 1)
    g_ids, q_ids = torch.arange(args.gallery) % persons, torch.arange(args.queries) % persons
    k = min(K, tokens)
    similarity = topk_mean_similarity(query, gallery, k)

    def own_metrics() -> tuple[float, float]:
        metrics = retrieval(query, gallery, q_ids, g_ids, k, topk=0).metrics
        return metrics["mAP"], metrics["mINP"]

    def all_direct() -> tuple[float, float]:
        return direct_metrics(direct_evaluation_similarity(query, gallery, k).cpu(), q_ids, g_ids)

    size = f"{args.queries} x {args.gallery} x {tokens}"
    rows = [
        compared(
            f"similarity, {size}, ms",
            lambda: direct_evaluation_similarity(query, gallery, k),
            lambda: topk_mean_similarity(query, gallery, k),
            args.repeats,
            device,
            1e-5,
        ),
        compared("features to mAP and mINP, ms", all_direct, own_metrics, args.repeats, device, 1e-2),
    ]
    assert similarity.shape == (args.queries, args.gallery)
    return rows
