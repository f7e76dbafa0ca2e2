"""The two towers, stock `transformers` classes: SwinV2 for images, Llama for dialogues, with optional LoRA adapters."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, Swinv2Config, Swinv2Model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from diana.model.config import ATTENTION, DROP_PATH_SCHEDULES
from tbps_common.errors import InputError

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_DROPOUT = 0.05

_TORCH_SETTINGS = ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation_internal")


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of a sample with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        kept = 1 - self.rate
        shape = (len(branch),) + (1,) * (branch.dim() - 1)
        return branch.div(kept) * torch.floor(kept + torch.rand(shape, dtype=branch.dtype, device=branch.device))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def build_vision(settings: Mapping[str, Any]) -> Swinv2Model:
    """A randomly initialised image tower with drop path as the released code has it.

    Under transformers 4.45 every block drops with the same probability; newer versions let it grow from 0 to the given
    rate. `drop_path_schedule` chooses: `constant` (the default) or `linear`.

    Raises:
        InputError: settings that Swinv2Config refuses, or a rate outside [0, 1).
    """
    rate = settings.get("drop_path_rate", Swinv2Config().drop_path_rate)
    schedule = settings.get("drop_path_schedule", "constant")
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise InputError(f"drop_path_rate must be at least 0 and below 1, but it is {rate!r}.")
    if schedule not in DROP_PATH_SCHEDULES:
        raise InputError(f"drop_path_schedule must be {' or '.join(DROP_PATH_SCHEDULES)}, but it is {schedule!r}.")
    own = {name: value for name, value in settings.items() if name not in ("drop_path_schedule", "pretrained")}
    tower = Swinv2Model(_config(Swinv2Config, {**own, "drop_path_rate": 0.0}, "vision_config"))
    tower.config.drop_path_rate = rate
    stages: Any = tower.encoder.layers
    blocks = [block for stage in stages for block in stage.blocks]
    for number, block in enumerate(blocks):
        own_rate = rate if schedule == "constant" else rate * number / max(1, len(blocks) - 1)
        block.drop_path = DropPath(own_rate) if own_rate > 0 else nn.Identity()
    return tower


def build_llama(settings: Mapping[str, Any], *, empty: bool = False) -> LlamaModel:
    """A dialogue tower, causal, with torch's scaled dot product attention.

    Args:
        settings: of LlamaConfig.
        empty: leave the parameters uninitialised (they are about to be loaded; drawing 1.2 billion numbers takes longer
            than reading them).

    Raises:
        InputError: settings that LlamaConfig refuses.
    """
    config = _config(
        LlamaConfig, {name: value for name, value in settings.items() if name != "pretrained"}, "llama_config"
    )
    config.use_cache = False
    if not empty:
        return LlamaModel(config)
    with torch.device("meta"):
        tower = LlamaModel(config)
    tower.to_empty(device="cpu")
    tower.rotary_emb = LlamaRotaryEmbedding(config=config)  # computed, not stored
    return tower


def _config(kind: type, settings: Mapping[str, Any], name: str) -> Any:
    values = {key: value for key, value in settings.items() if key not in _TORCH_SETTINGS}
    try:
        return kind(**values)
    # transformers checks values with exceptions of its own, which derive from different classes in different versions.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be used: {reason}.") from error


def round_rotary(tower: LlamaModel, dtype: torch.dtype) -> None:
    """Recompute the rotary frequencies and round them to `dtype`; they stay float32 tensors."""
    device = tower.rotary_emb.inv_freq.device
    exact = LlamaRotaryEmbedding(config=tower.config).to(device)
    for name in ("inv_freq", "original_inv_freq"):
        getattr(exact, name).copy_(getattr(exact, name).to(dtype))
    tower.rotary_emb = exact


class AdaptedLlama(nn.Module):
    """A Llama tower under LoRA adapters, with the parameter names that peft gives it in a checkpoint.

    Rank r, alpha 2 r, dropout 0.05, on the seven projections of every layer. The tower itself is frozen.
    """

    def __init__(self, tower: LlamaModel, rank: int) -> None:
        super().__init__()
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=LORA_DROPOUT, bias="none", target_modules=LORA_TARGETS
        )
        self.base_model = LoraModel(tower, settings, "default")

    @property
    def tower(self) -> LlamaModel:
        """The Llama model inside."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def merge(self) -> LlamaModel:
        """The tower with `W + 2 B A` in place of every adapted `W`; this module must not be used afterwards."""
        merged = self.base_model.merge_and_unload()
        assert isinstance(merged, LlamaModel)
        return merged


def set_checkpointing(tower: PreTrainedModel, on: bool) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # transformers 5.2x renamed the pair of methods; the old names warn.
    stem = "activation_checkpointing" if hasattr(tower, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(tower, f"{stem}_enable")({"use_reentrant": False})
    else:
        getattr(tower, f"{stem}_disable")()


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Attention implementation of the dialogue tower.

    Args:
        requested: `auto` is flash-attention where the package is installed and the tower computes in half precision on
            a GPU, else torch's scaled dot product attention; other names are taken as they are.
        device: where the tower is.
        dtype: what it computes in.

    Raises:
        InputError: an unknown name, or flash-attention that cannot run.
    """
    if requested not in ATTENTION:
        raise InputError(f"--attn_implementation must be one of {', '.join(ATTENTION)}, but it is {requested!r}.")
    installed = find_spec("flash_attn") is not None
    usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if requested == "auto":
        return "flash_attention_2" if installed and usable else "sdpa"
    if requested == "flash_attention_2" and not installed:
        raise InputError(
            "--attn_implementation flash_attention_2 needs the package flash-attn: install it, or use sdpa."
        )
    if requested == "flash_attention_2" and not usable:
        raise InputError("--attn_implementation flash_attention_2 needs a GPU and half precision: use sdpa.")
    return requested
