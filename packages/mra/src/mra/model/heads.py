"""The heads: projections for the direct comparison, what they pool, and the matching classifier."""

import torch
from torch import Tensor, nn

from mra.model.settings import ModelSettings


def matching_head(width: int) -> nn.Sequential:
    """Logits (no match, match) of the fused first token `[B, width]`."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 2))


def projection(settings: ModelSettings, width: int, pooled: int) -> nn.Module:
    """Head that makes a feature for the direct comparison, from the first token or from `pooled` vectors."""
    if settings.linear_heads:
        return nn.Linear(width, settings.embed_dim)
    linear = nn.Linear(pooled * width, settings.embed_dim)
    nn.init.normal_(linear.weight, std=1e-5)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(pooled * width), nn.Dropout(settings.itc_dop), linear)


def thirds(tokens: Tensor) -> Tensor:
    """Means over three ranges of tokens `[B, T, D]`, joined to `[B, 3 D]`; the ranges of AdaptiveAvgPool1d(3)."""
    count = tokens.shape[1]
    bounds = [(third * count // 3, -(-(third + 1) * count // 3)) for third in range(3)]
    return torch.cat([tokens[:, start:stop].mean(dim=1) for start, stop in bounds], dim=1)


def thirds_inside(tokens: Tensor, inside: Tensor) -> Tensor:
    """`thirds` of the tokens whose entry of `inside` `[B, T]` is 1, at least one in each row."""
    place = inside.cumsum(dim=1) - 1  # (B, T): position among the tokens inside
    count = inside.sum(dim=1, keepdim=True)
    means = []
    for third in range(3):
        start, stop = third * count // 3, -(-(third + 1) * count // 3)
        chosen = (inside * (place >= start) * (place < stop)).to(tokens.dtype)
        means.append((chosen.unsqueeze(1) @ tokens).squeeze(1) / chosen.sum(dim=1, keepdim=True))
    return torch.cat(means, dim=1)
