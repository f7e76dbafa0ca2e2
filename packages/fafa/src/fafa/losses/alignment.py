"""Fine-grained dynamic alignment (FDA): one query vector against the best tokens of every target."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_similarity(query: Tensor, targets: Tensor) -> Tensor:
    """Inner products of every query with every token of every target, as one matrix product.

    Args:
        query: `[Q, D]`, unit rows.
        targets: `[G, T, D]`, unit tokens.

    Returns:
        `[Q, G, T]`.
    """
    groups, tokens, width = targets.shape
    return (query @ targets.reshape(groups * tokens, width).t()).view(len(query), groups, tokens)


def pool_tokens(similarity: Tensor, k: int, soft: bool = True) -> Tensor:
    """Similarity of a pair: mean of the `k` largest over the tokens, or (`soft=False`) the largest.

    Args:
        similarity: `[..., T]`.
        k: tokens that count; all of them when `k` is at least T.
        soft: False for the maximum alone.

    Returns:
        `[...]`.
    """
    if not soft or k == 1:
        return similarity.amax(dim=-1)
    if k >= similarity.shape[-1]:
        return similarity.mean(dim=-1)
    # Which of equal values is taken changes neither the mean nor, summed over the pair, the gradient.
    return similarity.topk(k, dim=-1, sorted=False).values.mean(dim=-1)


def compute_sdm(sim_matrix: Tensor, qid: Tensor, epsilon: float = 1e-8, factor: float = 1) -> Tensor:
    """Similarity-distribution matching: KL(softmax of the similarities || distribution of the identities).

    `y_ij` is 1 on the diagonal, `factor` where i and j share their identity, else 0; `p` is `y` with rows summing to
    one. The loss is `1/2 (mean_i KL(softmax_j z_ij || p_ij) + mean_i KL(softmax_j z_ji || p_ij))`, `p` raised by
    `epsilon`.

    Args:
        sim_matrix: `[B, B]` similarities divided by the temperature (z); row i belongs with column i.
        qid: `[B]` integer identities, on any device.
        epsilon: keeps the logarithm of `p` finite.
        factor: weight of a pair of the same identity off the diagonal (the soft-label strength).

    Returns:
        Scalar.
    """
    qid = qid.reshape(-1).to(sim_matrix.device)
    same = qid[:, None] == qid[None, :]
    labels = same.to(torch.float32)
    if factor != 1:
        labels = labels * factor
        labels.fill_diagonal_(1.0)
    log_labels = (labels / labels.sum(dim=1) + epsilon).log()

    def divergence(logits: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(logits, dim=1)
        return (log_probabilities.exp() * (log_probabilities - log_labels)).sum(dim=1).mean()

    return (divergence(sim_matrix) + divergence(sim_matrix.t())) / 2


def contrastive_loss(sim_matrix: Tensor) -> Tensor:
    """Cross-entropy of `[B, B]` logits against their diagonal: FDA with neither SDM nor hard-negative NCE."""
    return F.cross_entropy(sim_matrix, torch.arange(len(sim_matrix), device=sim_matrix.device))
