"""The parameter order of the released code, and loading of whole CMLFA checkpoints."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly

logger = logging.getLogger("cmlfa.model")

# The order in which the released code registers its parameters, which numbers the entries of an optimizer state.
# open_clip registers the same parameters in another order.
_STEMS = (
    "base_model.positional_embedding",
    "base_model.text_projection",
    "base_model.visual.class_embedding",
    "base_model.visual.positional_embedding",
    "base_model.visual.proj",
    "base_model.visual.conv1.",
    "base_model.visual.ln_pre.",
    "base_model.visual.transformer.",
    "base_model.visual.ln_post.",
    "base_model.transformer.",
    "base_model.token_embedding.",
    "base_model.ln_final.",
    "shared_transformer.",
    "classifier.",
    "cross_attn.",
    "cross_modal_transformer.",
    "ln_pre_t.",
    "ln_pre_i.",
    "ln_post.",
    "mlm_head.dense.",
    "mlm_head.ln.",
    "mlm_head.fc.",
    "safl.part_tokens",
    "safl.pos_embeding",
    "safl.feed.0.",
    "safl.feed.1.",
    "safl.feed.4.",
)
_LEAVES = (
    "",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "ln_1.weight",
    "ln_1.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "in_proj_weight",
    "in_proj_bias",
    "out_proj.weight",
    "out_proj.bias",
    "weight",
    "bias",
)
_BLOCK = re.compile(r"resblocks\.(\d+)\.(.*)")
# What evaluation does without: the heads of the training losses.
_TRAINING_ONLY = (
    "classifier.",
    "cross_attn.",
    "cross_modal_transformer.",
    "ln_pre_t.",
    "ln_pre_i.",
    "ln_post.",
    "mlm_head.",
)


def official_param_order(model: nn.Module) -> list[str]:
    """Names of the model's parameters in the order of the released code.

    Raises:
        ValueError: the model has a parameter that CMLFA does not know.
    """
    return sorted((name for name, _ in model.named_parameters()), key=_official_position)


def _official_position(name: str) -> tuple[int, int, int]:
    for stem_position, stem in enumerate(_STEMS):
        if name.startswith(stem):
            leaf, block = name.removeprefix(stem), 0
            if match := _BLOCK.fullmatch(leaf):
                block, leaf = int(match[1]), match[2]
            return stem_position, block, _LEAVES.index(leaf)
    raise ValueError(f"{name} is not a parameter of CMLFA, so it has no place in the order of the released code")


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """Load CMLFA weights into `model`; dtypes are converted on the way.

    Args:
        model: the network of `build_model`.
        source: path of a `.pth`/`.pt`/`.safetensors` file, or a mapping: `{"model": state, ...}`,
            `{"state_dict": state}` or the state itself; `module.` before every name is removed.
        strict: every name and shape must fit. With False (evaluation) the heads of the training losses may be absent,
            superfluous, or, for the classifier, of another size; each such case is logged as a warning.
        trust: unpickle a file that holds more than plain data (it can run code; only for files of known origin).

    Returns:
        The entries beside the weights (`epoch`, `optimizer`, ...).

    Raises:
        CheckpointError: the file cannot be read, or names or shapes do not fit; the message names them and nothing of
            the model has changed.
    """
    if isinstance(source, Mapping):
        name, content = "the given state dict", source
    else:
        name, content = os.fspath(source), load_checkpoint_file(source, trust=trust)
    state, remaining = find_state_dict(content, source=name)
    if strict:
        load_state_dict_strictly(model, state, source=name)
    else:
        load_but_heads(model, state, source=name)
    return remaining


def load_but_heads(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights of CMLFA whose training heads may be absent, superfluous or, for the classifier, of another size.

    Each such case is logged as a warning.

    Raises:
        CheckpointError: other names or shapes do not fit; nothing of the model has changed.
    """
    wanted = model.state_dict()
    superfluous = [key for key in state if key not in wanted and key.startswith(_TRAINING_ONLY)]
    if superfluous:
        logger.warning(
            "%s: %d weights of training heads that this model does not have are left out", source, len(superfluous)
        )
    for warning in load_state_dict_strictly(
        model,
        {key: tensor for key, tensor in state.items() if key not in superfluous},
        source=source,
        may_be_missing=lambda key: key.startswith(_TRAINING_ONLY),
        skip_shape_mismatch=lambda key: key.startswith("classifier."),
    ):
        logger.warning("%s", warning)
