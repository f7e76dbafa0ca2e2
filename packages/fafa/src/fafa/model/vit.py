"""The two vision towers, on the classes of transformers: images in, tokens before `ln_vision` out.

Both are `EvaViT` / `ClipViT` with a `trunk` from the library whose final norm is taken out: FAFA normalises with its own
`ln_vision`, whose epsilon differs.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from fafa.model.settings import ModelSettings

# LAVIS recomputes only the later half of CLIP's blocks; the earlier ones keep their activations.
_CLIP_FIRST_CHECKPOINTED = 13


class Embeddings(nn.Module):
    """Patches, class token and positions of the EVA tower, added in float32.

    The library's module would cast the sum, and with it the residual stream of the whole tower, to the dtype of the
    patch matrix (float16); LAVIS keeps it in float32.
    """

    def __init__(self, width: int, image_size: int, patch_size: int):
        super().__init__()
        self.image_size = image_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, 3, S, S]` to `[B, N + 1, W]`."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # [B, W, g, g]
        tokens = patches.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)  # [B, N, W]
        return (
            torch.cat([self.class_embedding.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.position_embedding
        )


class QkvLinear(nn.Linear):
    """Joint projection whose bias is (q_bias, 0, v_bias): the key part has none that could be trained."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., W]` to `[..., 3W]`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(input, self.weight, bias.to(self.weight.dtype))


class StochasticDepth:
    """Forward hook that drops a residual branch for some samples and scales it for the others, in training."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep = torch.rand(len(output), 1, 1, device=output.device) >= self.rate
        return output * keep.to(output.dtype) / (1 - self.rate)


def _recompute_blocks(trunk: Any) -> None:
    """Keep the inputs of the blocks alone, and compute the rest again in the backward pass."""
    # transformers 5.2x renamed the method; the old name goes with version 6.
    enable = getattr(trunk, "activation_checkpointing_enable", None) or trunk.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class EvaViT(nn.Module):
    """EVA-CLIP ViT-g/14 without its last block and without a final norm (spec name `eva_clip_g`)."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        sizes: dict[str, Any] = dict(
            hidden_size=settings.vit_width,
            intermediate_size=int(settings.vit_width * settings.vit_mlp_ratio),
            num_hidden_layers=settings.vit_depth,
            num_attention_heads=settings.vit_heads,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            layer_norm_eps=1e-6,
            initializer_range=0.02,
            attn_implementation="sdpa",
        )
        self.trunk: Any = Blip2VisionModel(Blip2VisionConfig(**sizes))
        self.trunk.embeddings = Embeddings(settings.vit_width, settings.image_size, settings.patch_size)
        self.trunk.post_layernorm = nn.Identity()
        nn.init.trunc_normal_(self.trunk.embeddings.class_embedding, std=0.02)
        nn.init.trunc_normal_(self.trunk.embeddings.position_embedding, std=0.02)
        for index, layer in enumerate(self.trunk.encoder.layers):
            qkv = QkvLinear(settings.vit_width)
            qkv.weight = layer.self_attn.qkv.weight
            layer.self_attn.qkv = qkv
            with torch.no_grad():
                # Deeper blocks start with a smaller contribution to the residual stream.
                layer.self_attn.projection.weight.div_(math.sqrt(2 * (index + 1)))
                layer.mlp.fc2.weight.div_(math.sqrt(2 * (index + 1)))
            rate = settings.drop_path_rate * index / max(settings.vit_depth - 1, 1)
            if rate > 0:
                layer.self_attn.projection.register_forward_hook(StochasticDepth(rate))
                layer.mlp.fc2.register_forward_hook(StochasticDepth(rate))
        if settings.use_grad_checkpoint and not settings.freeze_vit:
            _recompute_blocks(self.trunk)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, S, S]` to `[B, N + 1, W]`."""
        return self.trunk(pixel_values=image).last_hidden_state


class ClipViT(nn.Module):
    """OpenAI CLIP ViT-L/14 without its last block, final norm and projection (spec name `clip_L`)."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        sizes: dict[str, Any] = dict(
            hidden_size=settings.vit_width,
            intermediate_size=4 * settings.vit_width,
            num_hidden_layers=settings.vit_depth,
            num_attention_heads=settings.vit_heads,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            attn_implementation="sdpa",
        )
        self.trunk: Any = CLIPVisionModel(CLIPVisionConfig(**sizes))
        # Only the pooled output would pass it, which nothing uses.
        self.trunk.post_layernorm = nn.Identity()
        if settings.use_grad_checkpoint and not settings.freeze_vit:
            _recompute_blocks(self.trunk)
            for layer in self.trunk.encoder.layers[:_CLIP_FIRST_CHECKPOINTED]:
                layer.gradient_checkpointing = False

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, S, S]` to `[B, N + 1, W]`."""
        return self.trunk(pixel_values=image).last_hidden_state


class _WithoutRandomNumbers(TorchFunctionMode):
    """Fills tensors with zeros instead of random numbers: for a billion weights those take half a minute.

    Left as they lie in memory, values beyond the bounds would keep torch's `trunc_normal_` drawing for ever.
    """

    # By name: transformers puts functions of its own in the place of torch's while it builds a model.
    _FILLING = frozenset({"kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in self._FILLING:
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
        with torch.no_grad():
            return tensor.zero_()


def build_vit(settings: ModelSettings, empty: bool = False) -> EvaViT | ClipViT:
    """The tower that `settings.vit_model` names.

    Args:
        settings: its sizes.
        empty: weights are zero, to be overwritten by a file's; else random.
    """
    with _WithoutRandomNumbers() if empty else nullcontext():
        return EvaViT(settings) if settings.vit_model == "eva_clip_g" else ClipViT(settings)
