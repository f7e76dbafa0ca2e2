"""Official checkpoints: which names learn faster, and loading a whole model with resampled position tables."""

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mra.model.position_tables import interpolate_relative_pos_embed
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

if TYPE_CHECKING:
    from mra.model.retrieval import Retrieval

logger = logging.getLogger("mra.model")

# Constants stored beside the weights: the model keeps its own, and nobody misses them in a checkpoint.
_CONSTANTS = ("relative_position_index", "attn_mask", "position_ids")
_PROJECTIONS = ("vision_proj.", "text_proj.")
_TABLE = "relative_position_bias_table"
_PRETRAINED_WINDOW = 7
_SHOWN = 5

# With `lr_2` the parameters nearest to the losses learn with `lr_mult` times the rate.
_FASTER = re.compile(
    r"vision_encoder\.layers\.[23]\.|text_encoder\.bert\.encoder\.layer\.(4|5|10|11)\.|text_encoder\.cls\.|itm_head\."
)
_TIED_WEIGHT = "text_encoder.cls.predictions.decoder.weight"


def initial_parameter_names(model: "Retrieval") -> list[str]:
    """Official names of the parameters with `lr_mult` times the learning rate, sorted.

    With `init_cross` the cross-attention, which no start file holds; with `lr_2` the last stages and layers, the MLM and
    the ITM head. The tied decoder weight is listed as in the released code, without effect.
    """
    settings = model.settings
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if settings.init_cross and ".crossattention." in name}
    if settings.lr_2:
        chosen |= {name for name in [*names, _TIED_WEIGHT] if _FASTER.match(name)}
    return sorted(chosen)


def projection_names(model: "Retrieval") -> list[str]:
    """Official names of the parameters of the projections."""
    return [name for name, _ in model.named_parameters() if name.startswith(_PROJECTIONS)]


def load_pretrained(
    model: "Retrieval",
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Mapping[str, Any],
    is_eval: bool = False,
    *,
    trust: bool = False,
) -> tuple[list[str], list[str]]:
    """Load a whole checkpoint (of MRA, or of its parent project APTM).

    Args:
        model: receives the weights.
        source: path of a checkpoint, or what it holds: `{"model": state, ...}` or the state itself.
        config: the configuration; if its `window_size` is not 7, relative-position tables are resampled to it (to 4 in
            the last stage for a window of 8).
        is_eval: the checkpoint is of this very model: nothing is resampled, and the projections must fit, too.
        trust: unpickle a file that holds more than plain data (it can run code; only for files of known origin).

    Returns:
        Missing and superfluous names. Unless evaluating these may be projections, which have another form for RSTPReid
        (`embed_dim` 256) than for the other data sets and then keep their random values; anything else is an error.

    Raises:
        CheckpointError: unreadable file, or names or shapes that do not fit; the model has not changed then.
    """
    if isinstance(source, Mapping):
        name, content = "the given state dict", source
    else:
        name, content = os.fspath(source), load_checkpoint_file(source, trust=trust)
    state, _ = find_state_dict(content, source=name)
    state = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in _CONSTANTS}
    window = int(config.get("window_size", _PRETRAINED_WINDOW))
    if not is_eval and window != _PRETRAINED_WINDOW:
        state = _resample_tables(state, window)

    own = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[2] not in _CONSTANTS}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    lenient = () if is_eval else _PROJECTIONS
    complaints = [
        _listed("missing", [key for key in missing if not key.startswith(lenient)]),
        _listed("unexpected", [key for key in unexpected if not key.startswith(lenient)]),
        _listed("of another shape", misshapen),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{name} does not fit this model: {'; '.join(filter(None, complaints))}; give the checkpoint of this --task, "
            "or the configuration it was trained with."
        )
    model.load_state_dict({key: tensor for key, tensor in state.items() if key in own}, strict=False)
    if missing or unexpected:
        logger.warning(
            "%s has projections of another form (embed_dim %s 256): the model's own stay random and are learnt anew",
            name,
            "not" if model.settings.linear_heads else "of",
        )
    return missing, unexpected


def _resample_tables(state: Mapping[str, Tensor], window: int) -> dict[str, Tensor]:
    resampled = {}
    for key, tensor in state.items():
        if key.endswith(_TABLE):
            target = 4 if window == 8 and ".layers.3." in key else window
            tensor = interpolate_relative_pos_embed(tensor, (2 * target - 1) ** 2)
        resampled[key] = tensor
    return resampled


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
