"""The adaptive attribute refiner: K learnt queries gather what image tokens or dialogue tokens say about K attributes."""

import torch
from torch import Tensor, nn

from tbps_common.errors import InputError

HEAD_WIDTH = 64
QUERY_DEVIATION = 0.02


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), over the K attributes of one sample."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = _MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Blocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class AttributeRefiner(nn.Module):
    """Cross-attention of K queries over the tokens of one modality, then blocks of self-attention over the K results.

    The same weights serve images and dialogues. There is no norm around the cross-attention, no residual, and no norm at
    the end, as in the released code.

    Args:
        width: D of the joint space, a multiple of 64.
        num_query: K.
        layers: blocks of self-attention.

    Raises:
        InputError: the width is not a multiple of 64.
    """

    def __init__(self, width: int, num_query: int, layers: int) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise InputError(f"With a refiner embed_dim must be a multiple of {HEAD_WIDTH}, but it is {width}.")
        heads = width // HEAD_WIDTH
        self.attr_query_token = nn.Parameter(torch.empty(1, num_query, width))
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.transformer = _Blocks(width, layers, heads)
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        scale = width**-0.5
        output_scale = scale * (2 * layers) ** -0.5 if layers else scale
        nn.init.normal_(self.attr_query_token, std=QUERY_DEVIATION)
        blocks = [block for block in self.transformer.resblocks if isinstance(block, ResidualAttentionBlock)]
        for attention in (self.cross_attn, *(block.attn for block in blocks)):
            nn.init.normal_(attention.in_proj_weight, std=scale)
            nn.init.normal_(attention.out_proj.weight, std=output_scale)
            nn.init.zeros_(attention.in_proj_bias)
            nn.init.zeros_(attention.out_proj.bias)
        for block in blocks:
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=output_scale)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attributes `[B, K, D]` of tokens `[B, N, D]`.

        Args:
            tokens: projected tokens of an image or a dialogue.
            attention_mask: `[B, N]`, 0 for padding; None where every token counts.
        """
        queries = self.attr_query_token.expand(len(tokens), -1, -1)
        ignored = None if attention_mask is None else attention_mask == 0
        attended = self.cross_attn(queries, tokens, tokens, key_padding_mask=ignored, need_weights=False)[0]
        return self.transformer(attended)
