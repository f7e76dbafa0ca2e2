"""The training objectives of FAFA (paper sections 4.2 to 4.4), in plain torch: nothing here needs transformers.

FDA (fine-grained dynamic alignment): `token_similarity`, `pool_tokens`, `compute_sdm`. FD (feature diversity):
`FeatureDispersionLoss`. MFR (masked feature reasoning): `MaskedFeaturePrediction`. DSU (noise on the statistics of the target
tokens): `DistributionUncertainty`. Off by default: `HardNegativeNCE`, `mmd_loss`, `coral_loss`.
"""

import numpy as np
import torch
from torch import Tensor, nn
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


class FeatureDispersionLoss(nn.Module):
    """Mean over all n x n pairs of `relu(cosine - margin)`, the diagonal counting as cosine -1.

    All tokens of all images take part, so that tokens of different images repel each other too.

    Args:
        margin: cosine up to which tokens may resemble each other.
        sample_size: above this number of tokens, that many are drawn.
    """

    def __init__(self, margin: float = 0.5, sample_size: int = 1024):
        super().__init__()
        self.margin = margin
        self.sample_size = sample_size

    def forward(self, features: Tensor, indices: Tensor | None = None) -> Tensor:
        """Loss of the tokens.

        Args:
            features: `[B, T, D]`; normalised here (norms below 1e-8 count as 1e-8).
            indices: int64 `[n]`, which of the B*T tokens to use, in place of the draw.

        Returns:
            Scalar, computed in float32 (float64 for float64 features) also under autocast.
        """
        tokens = features.reshape(-1, features.shape[-1])
        if indices is None and len(tokens) > self.sample_size:
            indices = torch.randperm(len(tokens), device=tokens.device)[: self.sample_size]
        if indices is not None:
            tokens = tokens[indices.to(tokens.device)]
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            unit = F.normalize(tokens, dim=-1, eps=1e-8)
            # Rows of unit length: the product is the cosine, without the n x n x D broadcast of a pairwise cosine.
            cosine = unit @ unit.t()
            diagonal = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
            return F.relu(cosine.masked_fill(diagonal, -1.0) - self.margin).mean()


class MaskedFeaturePrediction(nn.Module):
    """Two-layer predictor of masked elements, the same for both directions.

    With masks M (1 = hidden), `pred_A = P([A * (1 - M_A), B])` and `pred_B = P([B * (1 - M_B), A])`; the loss is the
    mean of the two squared errors per hidden element. Nothing is detached.

    Args:
        feature_dim: width of both features.
        mask_ratio: probability that an element is hidden.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, feature_dim: int, mask_ratio: float = 0.3, hidden_dim: int = 512):
        super().__init__()
        self.mask_ratio = mask_ratio
        # The names predictor.0 and predictor.2 are part of the checkpoint layout.
        self.predictor = nn.Sequential(
            nn.Linear(2 * feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, feature_dim)
        )

    def forward(
        self, feat_A: Tensor, feat_B: Tensor, mask_A: Tensor | None = None, mask_B: Tensor | None = None
    ) -> Tensor:
        """Loss of both directions.

        Args:
            feat_A: `[B, H]` fused feature of reference and caption.
            feat_B: `[B, H]` feature of the target.
            mask_A: `[B, H]`, 1 = hidden, in place of the draw.
            mask_B: likewise.

        Returns:
            Scalar.
        """
        first = self._error(feat_A, feat_B, mask_A)
        return (first + self._error(feat_B, feat_A, mask_B)) / 2

    def _error(self, feature: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.rand(feature.shape, device=feature.device) < self.mask_ratio
        mask = mask.to(feature.device, feature.dtype)
        predicted = self.predictor(torch.cat([feature * (1 - mask), context], dim=-1))
        squared = ((predicted - feature) * mask).square()
        # No element hidden: no error, where the plain quotient would be 0/0.
        return squared.sum() / mask.sum().clamp(min=1)


class DistributionUncertainty(nn.Module):
    """Replaces mean and deviation over the batch by draws around them, with probability `p`, in training only.

    Over the batch axis (divisor B - 1): `mu = mean x`, `sigma = sqrt(var x + eps)`, both `[T, H]`. How much they vary
    over the tokens gives the width of the noise: `beta = mu + n1 sqrt(var_t mu + eps)`,
    `gamma = sigma + n2 sqrt(var_t sigma + eps)` with standard normal n1, n2; the result is
    `(x - mu) / sigma * gamma + beta`. Gradients flow through all statistics.

    Args:
        p: probability of the noise. The draw comes from numpy's global generator, as in the released code.
        eps: added to variances.
    """

    def __init__(self, p: float = 0.8, eps: float = 1e-6):
        super().__init__()
        self.p = p
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        gate: float | None = None,
        eps_beta: Tensor | None = None,
        eps_gamma: Tensor | None = None,
    ) -> Tensor:
        """Noisy tokens in training, `x` itself otherwise.

        Args:
            x: `[B, T, H]`.
            gate: uniform number in place of the draw; above `p` nothing happens.
            eps_beta: `[T, H]` standard normal numbers (n1) in place of the draw.
            eps_gamma: likewise (n2).

        Returns:
            `[B, T, H]`. A batch of one has no variance and passes unchanged, as does a single token.
        """
        if not self.training:
            return x
        gate = float(np.random.random()) if gate is None else gate
        if gate > self.p or x.shape[0] < 2 or x.shape[1] < 2:
            return x
        mean = x.mean(dim=0)
        deviation = (x.var(dim=0) + self.eps).sqrt()
        beta = mean + self._noise(mean, eps_beta)
        gamma = deviation + self._noise(deviation, eps_gamma)
        return (x - mean) / deviation * gamma + beta

    def _noise(self, statistic: Tensor, normal: Tensor | None) -> Tensor:
        normal = torch.randn_like(statistic) if normal is None else normal.to(statistic)
        return normal * (statistic.var(dim=0, keepdim=True) + self.eps).sqrt()


class HardNegativeNCE(nn.Module):
    """Contrastive loss in both directions whose negatives weigh the more, the more similar they are.

    With `e_ij = exp(beta z_ij)`: `w_ij = (n - 1) e_ij / v_j` and `w'_ij = (n - 1) e_ij / v'_j`, where `v_j` is the sum
    of row j without its diagonal and `v'_j` that of column j; both have `alpha` on the diagonal. The loss is
    `mean_i(log sum_j exp(z_ij) w_ij - z_ii) + mean_j(log sum_i exp(z_ij) w'_ij - z_jj)`. That `w` divides entry (i, j)
    by the sum of row j is how the released code behaves.

    Args:
        alpha: weight of the positives.
        beta: how much similar negatives are preferred.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.5):
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, sim: Tensor) -> Tensor:
        """Scalar loss of `[n, n]` logits whose diagonal holds the positives."""
        count = len(sim)
        diagonal = torch.eye(count, dtype=torch.bool, device=sim.device)
        with torch.autocast(sim.device.type, enabled=False):
            logits = sim if sim.dtype == torch.float64 else sim.float()
            positives = logits.diagonal()
            # Everything in logarithms: the exponentials of logits over a small temperature overflow.
            hard = self.beta * logits
            negatives = hard.masked_fill(diagonal, float("-inf"))
            scale = torch.log(logits.new_tensor(float(count - 1)))
            alpha = torch.log(logits.new_tensor(float(self.alpha)))
            rows = torch.where(diagonal, alpha, scale + hard - negatives.logsumexp(dim=1)[None, :])
            columns = torch.where(diagonal, alpha, scale + hard - negatives.logsumexp(dim=0)[None, :])
            forward = ((logits + rows).logsumexp(dim=1) - positives).mean()
            return forward + ((logits + columns).logsumexp(dim=0) - positives).mean()


def mmd_loss(x: Tensor, y: Tensor, gamma: float = 1.0) -> Tensor:
    """Maximum mean discrepancy with the kernel `exp(-gamma |a - b|^2)`: mean k_xx + mean k_yy - 2 mean k_xy.

    Args:
        x: `[n, D]`.
        y: `[m, D]`.
        gamma: inverse width of the kernel.
    """

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        # Differences first, not |a|^2 + |b|^2 - 2ab: exact for equal rows, and n x m x D is small for one batch.
        return torch.exp(-gamma * (first[:, None] - second[None]).square().sum(dim=-1)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def coral_loss(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the covariances (divisor n - 1), over `4 D^2`.

    Args:
        x: `[n, D]`.
        y: `[m, D]`.
    """

    def covariance(features: Tensor) -> Tensor:
        centred = features - features.mean(dim=0)
        return centred.t() @ centred / (len(features) - 1)

    return (covariance(x) - covariance(y)).square().sum() / (4 * x.shape[1] ** 2)
