"""The Swin image encoder: timm's blocks under the names of the official checkpoints."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mra.model.settings import VisionSettings


class SwinStage(nn.Module):
    """Blocks of one resolution, then (but for the last stage) the merging of 2 x 2 tokens into one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, tokens: Tensor, checkpointing: bool) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, 2C]`, or `[B, H, W, C]` in the last stage."""
        for block in self.blocks:
            tokens = cast(Tensor, checkpoint(block, tokens, use_reentrant=False)) if checkpointing else block(tokens)
        return tokens if self.downsample is None else self.downsample(tokens)


class VisionEncoder(nn.Module):
    """Swin transformer whose output is the mean of the final tokens, then the tokens row by row.

    timm has the merging at the beginning of a stage, the official layout at the end of the one before; the modules are
    timm's, put where the official names are. The position indices and shift masks, which timm recomputes, are stored
    because official checkpoints hold them.
    """

    def __init__(self, settings: VisionSettings):
        super().__init__()
        windows = settings.windows
        swin = SwinTransformer(
            img_size=(settings.height, settings.width),
            window_size=cast(Any, [window for window, _ in windows]),
            embed_dim=settings.embed_dim,
            depths=tuple(settings.depths),
            num_heads=tuple(settings.num_heads),
            proj_drop_rate=settings.drop_rate,
            drop_path_rate=settings.drop_path_rate,
            norm_layer=nn.LayerNorm,
            num_classes=0,
            global_pool="",
        )
        stages = cast(list[Any], list(swin.layers))
        for stage, (_, shift) in zip(stages, windows):
            for block in stage.blocks:
                _store_buffers(block, shifted=shift > 0)
        self.patch_embed = swin.patch_embed
        self.pos_drop = nn.Dropout(settings.drop_rate)
        merges = [stage.downsample for stage in stages[1:]]
        self.layers = nn.ModuleList(
            SwinStage(list(stage.blocks), merge) for stage, merge in zip(stages, [*merges, None])
        )
        self.norm = swin.norm
        self.gradient_checkpointing = False

    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: `[B, 3, h, w]`, normalised.

        Returns:
            `[B, 1 + L, D_v]`: mean over the tokens, then the L tokens.
        """
        tokens = self.pos_drop(self.patch_embed(image))  # (B, h / 4, w / 4, C)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for stage in self.layers:
            tokens = stage(tokens, checkpointing)
        tokens = self.norm(tokens).flatten(1, 2)  # (B, L, D_v)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


def _store_buffers(block: Any, shifted: bool) -> None:
    """Make a timm block's constants part of the state dict, and its shift follow the official rule.

    timm decides about the shift for each direction, the official code for both at once. The two differ where a stage is
    no larger than its window in one direction only.
    """
    if not shifted:
        block.shift_size = (0, 0)
    mask = block.attn_mask if any(block.shift_size) else None
    block.register_buffer("attn_mask", mask, persistent=True)
    block.attn.register_buffer("relative_position_index", block.attn.relative_position_index, persistent=True)
