"""The two losses of the training: denoising within the attributes' regions, and localisation of the attention."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-5


def attribute_region(seg_maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of the attributes' regions at latent size; soft at the borders.

    Args:
        seg_maps: [B, N, R, R], 0 or 1.
        size: height and width of the latents.

    Returns:
        float [B, 1, h, w] in [0, 1], bilinear without antialias as released.
    """
    union = (seg_maps.sum(dim=1, keepdim=True) > 0).float()
    return F.interpolate(union, size=size, mode="bilinear", align_corners=False)


def masked_mse(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean over all elements of `(m * prediction - m * target)**2` in float32.

    Zeros outside the region count in the mean: it is not divided by the region's area, as released.

    Args:
        prediction: [B, 4, h, w].
        target: [B, 4, h, w].
        region: m, [B, 1, h, w]; None is 1 everywhere.
    """
    if region is not None:
        prediction, target = prediction * region, target * region
    return F.mse_loss(prediction.float(), target.float())


class BalancedL1Loss(nn.Module):
    """Mean attention outside the region minus mean attention inside it.

    Args:
        norm: divide each map by its maximum first.
    """

    def __init__(self, norm: bool = False):
        super().__init__()
        self.norm = norm

    def forward(self, prob: Tensor, seg_maps: Tensor) -> Tensor:
        """`sum p(1-s) / (sum(1-s) + 1e-5) - sum ps / (sum s + 1e-5)`, over the q positions.

        Args:
            prob: p, [B, H, q, N] attention on the N tokens.
            seg_maps: s, [B, H, q, N], 0 to 1.

        Returns:
            [B, H, N], within (-1, 1); negative where the attention is right.
        """
        if self.norm:
            prob = prob / (prob.max(dim=2, keepdim=True).values + _EPSILON)
        outside = (prob * (1 - seg_maps)).sum(dim=2) / ((1 - seg_maps).sum(dim=2) + _EPSILON)
        inside = (prob * seg_maps).sum(dim=2) / (seg_maps.sum(dim=2) + _EPSILON)
        return outside - inside


def attribute_localization_loss(
    attention: Mapping[str, Tensor],
    seg_maps: Tensor,
    token_idx: Tensor,
    token_idx_mask: Tensor,
    norm: bool = False,
    spatial_shape: Mapping[str, tuple[int, int]] | None = None,
) -> Tensor:
    """Mean over the captured layers of the balanced L1 loss of their valid tokens.

    Args:
        attention: layer name -> [B*H, q, L] probabilities, samples outermost, positions row by row.
        seg_maps: [B, N, R, R], 0 or 1.
        token_idx: [B, N] text position of each attribute.
        token_idx_mask: bool [B, N], which of them are used.
        norm: see `BalancedL1Loss`.
        spatial_shape: layer name -> rows and columns of its q positions; None means square maps.

    Returns:
        Scalar.

    Raises:
        ValueError: no layer was given, or a map does not have the positions its shape says.
    """
    if not attention:
        raise ValueError("no attention was captured, so there is nothing to localise")
    criterion = BalancedL1Loss(norm)
    valid = token_idx_mask.to(seg_maps.dtype)[:, None]  # (B, 1, N)
    used = valid.sum(dim=-1) + _EPSILON  # (B, 1)
    targets: dict[tuple[int, int], Tensor] = {}
    losses = []
    for name, probabilities in attention.items():
        rows, columns = _grid(name, probabilities, spatial_shape)
        if (rows, columns) not in targets:
            small = F.interpolate(
                seg_maps, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
            )  # (B, N, rows, columns)
            targets[rows, columns] = small.flatten(2).transpose(1, 2)[:, None]  # (B, 1, q, N)
        target = targets[rows, columns]
        batch, slots = token_idx.shape
        maps = probabilities.unflatten(0, (batch, -1))  # (B, H, q, L)
        places = token_idx[:, None, None, :].expand(batch, maps.shape[1], maps.shape[2], slots)
        per_token = criterion(maps.gather(3, places).to(target.dtype), target.expand(-1, maps.shape[1], -1, -1))
        losses.append(((per_token * valid).sum(dim=-1) / used).mean())
    return torch.stack(losses).mean()


def _grid(name: str, probabilities: Tensor, spatial_shape: Mapping[str, tuple[int, int]] | None) -> tuple[int, int]:
    positions = probabilities.shape[1]
    side = math.isqrt(positions)
    rows, columns = spatial_shape[name] if spatial_shape is not None else (side, side)
    if rows * columns != positions:
        raise ValueError(f"the attention of {name} has {positions} positions, not {rows} x {columns}")
    return rows, columns
