"""Capturing cross-attention probabilities through diffusers' attention-processor interface.

Nothing of diffusers is patched. A processor of ours stands in front of the one found in each supervised module. Outside
a recording it hands the call on, so that generation runs the fused kernel.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

STAGES = (
    "down_blocks.0",
    "down_blocks.1",
    "down_blocks.2",
    "mid_block",
    "up_blocks.1",
    "up_blocks.2",
    "up_blocks.3",
)
"""Stages of the U-Net of Stable Diffusion that attend to the text, in execution order."""


def supervised_cross_attentions(unet: nn.Module, loc_layers: int = 5) -> list[str]:
    """Names of the cross-attention modules in the `loc_layers` stages around the middle one, in execution order.

    Args:
        unet: `UNet2DConditionModel` with the four stages of Stable Diffusion.
        loc_layers: 1 (only the middle block) to 7 (all).

    Raises:
        ValueError: `loc_layers` is out of range, or the U-Net has no such stages.
    """
    if not 1 <= loc_layers <= len(STAGES):
        raise ValueError(f"loc_layers must lie between 1 and {len(STAGES)}, not {loc_layers}")
    first = (len(STAGES) - loc_layers) // 2
    attentions = [name for name, _ in unet.named_modules() if name.split(".")[-1] == "attn2"]
    chosen = [
        name for stage in STAGES[first : first + loc_layers] for name in attentions if name.startswith(f"{stage}.")
    ]
    if not chosen:
        raise ValueError("the U-Net has no cross-attention in the supervised stages: it is not Stable Diffusion's")
    return chosen


def attention_grids(unet: nn.Module, names: list[str], height: int, width: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each module's attention map for latents of `height` x `width`.

    Every stage has half the sides of the one before it, rounded up.
    """
    stages = len(unet.down_blocks)  # type: ignore[arg-type]
    grids = {}
    for name in names:
        place = re.match(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?", name)
        if place is None:
            raise ValueError(f"{name} is in no stage of the U-Net")
        number = int(place[2] or 0)
        halvings = {"down_blocks": number, "mid_block": stages - 1, "up_blocks": stages - 1 - number}[place[1]]
        rows, columns = height, width
        for _ in range(halvings):
            rows, columns = -(-rows // 2), -(-columns // 2)
        grids[name] = (rows, columns)
    return grids


class AttentionCapture:
    """Keeps the attention maps of the supervised modules of one U-Net while `recording`.

    Args:
        unet: gets a capturing processor in each supervised module; every other processor stays.
        loc_layers: stages to supervise.
    """

    def __init__(self, unet: Any, loc_layers: int):
        self.unet = [unet]  # in a list, so that this is no second registration of the module
        self.names = supervised_cross_attentions(unet, loc_layers)
        self._maps: dict[str, Tensor] | None = None
        processors = dict(unet.attn_processors)
        for name in self.names:
            processors[f"{name}.processor"] = CapturingProcessor(self, name, processors[f"{name}.processor"])
        unet.set_attn_processor(processors)

    @property
    def is_recording(self) -> bool:
        return self._maps is not None

    def keep(self, name: str, probabilities: Tensor) -> None:
        """Called by the processors during a recording."""
        assert self._maps is not None
        self._maps[name] = probabilities

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """The maps of the one forward pass within the context: name -> [B*H, q, L], with gradient.

        Raises:
            RuntimeError: afterwards, if a module's map is absent or without gradient: something replaced its processor
                (`enable_xformers...`, `fuse_qkv_projections`, a LoRA), or recomputes it (gradient checkpointing).
        """
        maps: dict[str, Tensor] = {}
        self._maps = maps
        try:
            yield maps
        finally:
            self._maps = None
        absent = [name for name in self.names if name not in maps]
        if absent:
            raise RuntimeError(
                f"the attention of {len(absent)} of {len(self.names)} supervised modules was not captured ({absent[0]}, "
                "...): another library has replaced the U-Net's attention processors"
            )
        if torch.is_grad_enabled() and not all(probabilities.requires_grad for probabilities in maps.values()):
            needs = any(parameter.requires_grad for parameter in self.unet[0].parameters())
            if needs:
                raise RuntimeError("the captured attention has no gradient: do not checkpoint the supervised modules")


class CapturingProcessor:
    """Cross-attention written out, so that its probabilities can be kept; the numbers are those of the fused kernel."""

    def __init__(self, capture: AttentionCapture, name: str, otherwise: Any):
        self.capture, self.name, self.otherwise = capture, name, otherwise

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, q, C] attends to [B, L, D]; returns [B, q, C]."""
        if not self.capture.is_recording:
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # (B*H, q, C/H)
        key = attn.head_to_batch_dim(attn.to_k(context))  # (B*H, L, C/H)
        value = attn.head_to_batch_dim(attn.to_v(context))
        probabilities = attn.get_attention_scores(query, key, attention_mask)  # (B*H, q, L)
        self.capture.keep(self.name, probabilities)
        attended = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](attended)) / attn.rescale_output_factor


def checkpoint_gradients(unet: Any, capture: AttentionCapture | None) -> None:
    """Turn on gradient checkpointing, except for what contains a supervised module.

    A checkpointed module runs twice, and its first pass, whose maps would be kept, has no graph.
    """

    def run(module: nn.Module, *inputs: Any) -> Any:
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=partial(recomputation_contexts, device))

    unet.enable_gradient_checkpointing(run)
    for name, module in unet.named_modules():
        # The block around it only checkpoints its other parts by itself, so it may stay on.
        if capture is not None and "attentions" in name.split(".") and hasattr(module, "gradient_checkpointing"):
            if any(supervised.startswith(f"{name}.") for supervised in capture.names):
                module.gradient_checkpointing = False


def recomputation_contexts(device: torch.device) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a checkpointed module's two runs: the second comes after the forward pass has left its own."""
    return nullcontext(), reference_attention(device)


def reference_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On the CPU, attention written out: the released numbers come from it, and the CPU's fused kernel rounds twice as
    coarsely, which small U-Nets amplify to 1e-3 of a gradient. At these sizes it is no slower."""
    return sdpa_kernel([SDPBackend.MATH]) if device.type == "cpu" else nullcontext()
