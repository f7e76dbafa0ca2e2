"""Which parameters decay, and layer-wise learning rates."""

import re
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from diana.model.diana import DiaNAModel

_NORMS = (nn.LayerNorm, LlamaRMSNorm)
_LLAMA_NAMES = ("query_tokens", "text_projection", "logit_scale")
_LLAMA_PREFIXES = ("llama.", "clip_projector2.", "itm_head.")
_VISION_PREFIXES = ("vision_model.", "clip_projector.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# Every tower counts as its layers, its embeddings and what follows the layers.
_EXTRA_LAYERS = 2


def decay_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: outside norms, and without "bias" in the name.

    The rule is the Hugging Face Trainer's. By it SwinV2's position-bias networks do not decay (their name holds
    "bias"), while the 0-dimensional temperature does.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, _NORMS)}
    return {name for name, _ in model.named_parameters() if "bias" not in name and name.rpartition(".")[0] not in norms}


def layer_decay_groups(
    model: DiaNAModel, lr: float, weight_decay: float, vit_rate: float = 1.0, llama_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups with a learning rate that shrinks towards the input, one per (tower, layer, decay or not).

    The factor is `rate ** (n - layer - 1)`, at most 1, with n the tower's layers + 2. Vectors and biases do not decay.
    Frozen parameters are left out.

    Args:
        model: the network.
        lr: learning rate of the topmost layers.
        weight_decay: of matrices.
        vit_rate: factor per SwinV2 stage.
        llama_rate: factor per Llama layer, also for what belongs to no tower.

    Returns:
        Dicts with `group_name`, `weight_decay`, `lr`, `lr_scale`, `param_names` (sorted) and `params`.
    """
    depths = {
        "vit": len(model.vision_model.config.depths) + _EXTRA_LAYERS,
        "llama": model.llama_tower.config.num_hidden_layers + _EXTRA_LAYERS,
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() != 1 and not name.endswith(".bias")
        tower = _tower(name)
        layer = _layer(name, tower, depths["llama"])
        rate, depth = (vit_rate, depths["vit"]) if tower == "vit" else (llama_rate, depths["llama"])
        scale = min(1.0, rate ** (depth - layer - 1))
        group = groups.setdefault(
            f"{tower}_layer_{layer}_{'decay' if decays else 'no_decay'}",
            {"weight_decay": weight_decay if decays else 0.0, "lr": lr * scale, "lr_scale": scale, "members": []},
        )
        group["members"].append((name, parameter))
    return [
        {
            "group_name": group_name,
            **{key: group[key] for key in ("weight_decay", "lr", "lr_scale")},
            "param_names": [name for name, _ in sorted(group["members"], key=lambda member: member[0])],
            "params": [parameter for _, parameter in sorted(group["members"], key=lambda member: member[0])],
        }
        for group_name, group in groups.items()
    ]


def _tower(name: str) -> str:
    if name in _LLAMA_NAMES or name.startswith(_LLAMA_PREFIXES):
        return "llama"
    return "vit" if name.startswith(_VISION_PREFIXES) else "other"


def _layer(name: str, tower: str, llama_depth: int) -> int:
    if not name.startswith(("llama.", "vision_model.")):
        return 0
    if match := _LAYER.search(name):
        return int(match[1]) + 1
    return 0 if tower == "vit" or "embed_tokens" in name else llama_depth
