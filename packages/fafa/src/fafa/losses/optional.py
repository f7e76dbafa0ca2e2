"""Losses that the released code knows and leaves off: hard-negative NCE, MMD, CORAL."""

import torch
from torch import Tensor, nn


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
