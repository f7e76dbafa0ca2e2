"""Feature diversity (FD): target tokens that resemble each other more than a margin are pushed apart."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
