"""Masked feature reasoning (MFR): each modality predicts what was hidden of it, with the other one's help."""

import torch
from torch import Tensor, nn


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
