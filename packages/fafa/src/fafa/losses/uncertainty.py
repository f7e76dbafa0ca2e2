"""Distribution uncertainty (DSU): training noise on the statistics of the target tokens."""

import numpy as np
import torch
from torch import Tensor, nn


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
