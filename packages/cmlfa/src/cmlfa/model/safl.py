"""Latent feature alignment: prototypes that gather the tokens of one modality (called SAFL in the released code)."""

import math

import torch
from torch import Tensor, nn

# The released checkpoints hold a table of this many rows that no forward pass reads.
UNUSED_POSITIONS = 162


class SAFL(nn.Module):
    """Prototypes attend over the tokens of one modality; a feed-forward block refines what they gathered.

    `A = softmax_N(Q X^T)` (logits are not scaled), `Z = A X / sqrt(D)` (the pooled value is), `Y = feed(Z)` without a
    residual. One instance serves images and texts. Padding tokens of a text take part.

    Args:
        dim: width D of the tokens.
        part_num: number K of prototypes (9 in the released code, 7 in the paper's figure).
        drop: dropout inside the feed-forward block.
    """

    def __init__(self, dim: int, part_num: int, drop: float = 0.3):
        super().__init__()
        self.part_tokens = nn.Parameter(torch.empty(part_num, dim))
        # Spelt as in the checkpoints. It is never used and never receives a gradient, but it is part of the format.
        self.pos_embeding = nn.Parameter(torch.empty(UNUSED_POSITIONS, dim))
        self.feed = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Linear(4 * dim, dim),
        )
        nn.init.kaiming_normal_(self.part_tokens)
        nn.init.kaiming_normal_(self.pos_embeding)

    def pool(self, tokens: Tensor) -> Tensor:
        """What each prototype gathers from `tokens` `[B, N, D]`, before the feed-forward block: `[B, K, D]`."""
        attention = (self.part_tokens @ tokens.transpose(1, 2)).softmax(dim=-1)  # (B, K, N)
        return (attention @ tokens) / math.sqrt(tokens.shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """Slots `[B, K, D]` of the tokens `[B, N, D]`."""
        return self.feed(self.pool(tokens))
