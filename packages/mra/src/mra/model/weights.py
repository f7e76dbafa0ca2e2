"""Weights from files: Swin and BERT to start pre-training from, and whole checkpoints in the official layout."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn

from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly

_BERT_FILES = ("model.safetensors", "pytorch_model.bin")
_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth"

# Constants stored beside the weights: the model keeps its own, and a checkpoint may lack them.
CONSTANTS = ("relative_position_index", "attn_mask", "position_ids")
_PROJECTIONS = ("vision_proj.", "text_proj.")
_TABLE = "relative_position_bias_table"
_PRETRAINED_WINDOW = 7
_SHOWN = 5


def load_swin(encoder: nn.Module, path: str) -> None:
    """Copy the weights of an official Swin checkpoint; its classifier is left out.

    Raises:
        CheckpointError: the file is absent, damaged, or of other sizes.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"The Swin start weights {path} do not exist: download {_SWIN_URL} there.")
    state, _ = find_state_dict(load_checkpoint_file(path), source=path)
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    state = {key: tensor for key, tensor in state.items() if not key.endswith(CONSTANTS)}
    load_state_dict_strictly(encoder, state, source=path, may_be_missing=lambda key: key.endswith(CONSTANTS))


def find_bert(folder: str) -> Path:
    """The weights file in a folder in the form of Hugging Face.

    Raises:
        InputError: there is no such folder or file.
    """
    for name in _BERT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(
        f"The text encoder's folder {folder} holds neither {' nor '.join(_BERT_FILES)}: download bert-base-uncased "
        "(https://huggingface.co/bert-base-uncased/tree/main) into it."
    )


def load_bert(encoder: nn.Module, folder: str) -> None:
    """Copy the weights of a BERT with MLM head; the cross-attention, which it lacks, keeps its random values.

    Raises:
        InputError: there is no weights file, or it does not fit `text_config`.
    """
    path = find_bert(folder)
    state = start_names_of_bert(find_state_dict(load_checkpoint_file(path), source=str(path))[0])
    wanted = encoder.state_dict()
    _check_size(state, wanted, path)
    load_state_dict_strictly(encoder, state, source=str(path), may_be_missing=is_new_in_bert)


def start_names_of_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a BERT file the text encoder takes, under today's names (the oldest files have TensorFlow's of LayerNorm)."""
    current = {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key)): tensor for key, tensor in state.items()
    }
    return {key: tensor for key, tensor in current.items() if not _is_superfluous(key)}


def _is_superfluous(key: str) -> bool:
    return key.startswith(("bert.pooler.", "cls.seq_relationship.")) or key == "bert.embeddings.position_ids"


def is_new_in_bert(key: str) -> bool:
    """Whether a BERT file may lack a weight of the text encoder: the cross-attention, and the decoder, which is tied."""
    return ".crossattention." in key or key.startswith("cls.predictions.decoder.") or key.endswith("position_ids")


def _check_size(state: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    table = "bert.embeddings.word_embeddings.weight"
    if table in state and state[table].shape != wanted[table].shape:
        raise CheckpointError(
            f"{path} has a table of {' x '.join(map(str, state[table].shape))} word embeddings, but text_config asks for "
            f"{' x '.join(map(str, wanted[table].shape))}: use the text_config of that model."
        )


def load_official(
    model: nn.Module,
    content: Any,
    *,
    name: str,
    window: int | None = None,
    strict: bool = False,
) -> tuple[list[str], list[str]]:
    """Load a whole checkpoint (of MRA, or of its parent project APTM).

    Args:
        model: receives the weights.
        content: of a checkpoint: `{"model": state, ...}` or the state itself.
        name: how messages call the checkpoint.
        window: resample relative-position tables to this window (to 4 in the last stage for a window of 8); by default,
            and for the window of the pre-trained model, they stay as they are.
        strict: the projections must fit, too.

    Returns:
        Missing and superfluous names. Unless `strict`, these may be projections, which have another form for RSTPReid
        (`embed_dim` 256) than for the other data sets and then keep their random values; anything else is an error.

    Raises:
        CheckpointError: names or shapes do not fit; the model has not changed then.
    """
    state, _ = find_state_dict(content, source=name)
    state = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in CONSTANTS}
    if window not in (None, _PRETRAINED_WINDOW):
        state = _resample_tables(state, window)

    own = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[2] not in CONSTANTS}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    lenient = () if strict else _PROJECTIONS
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


def interpolate_relative_pos_embed(table: Tensor, dst_num_pos: int) -> Tensor:
    """Resample a table of relative positions, as Swin's fine-tuning at another window size does (geometric spline).

    The source positions are laid out with distances that grow by a factor q, chosen so that they reach the border of the
    target; a bicubic spline through them is read at the whole numbers of the target.

    Args:
        table: `[(2w - 1)^2, heads]`, row by row.
        dst_num_pos: `(2v - 1)^2` rows wanted.

    Returns:
        `[dst_num_pos, heads]` in the dtype and on the device of `table`; the table itself if it has that size already.

    Raises:
        CheckpointError: a size that is not the square of an odd number, or a source window below 3 (a cubic spline needs four
            points).
    """
    side, target = _side(len(table), "the table"), _side(dst_num_pos, "the model")
    if side == target:
        return table
    if side < 5:
        raise CheckpointError(
            f"A relative-position table of {side} x {side} entries is too small to be resampled to {target} x {target}: "
            "the checkpoint's window must be at least 3."
        )
    source = _grid(side // 2, target // 2)
    wanted = np.arange(-(target // 2), target // 2 + 1, dtype=np.float64)
    values = table.detach().to("cpu", torch.float64).view(side, side, -1).numpy()
    heads = [RectBivariateSpline(source, source, values[:, :, head])(wanted, wanted) for head in range(values.shape[2])]
    resampled = torch.from_numpy(np.stack(heads, axis=-1).reshape(dst_num_pos, -1))
    return resampled.to(table.device, table.dtype)


def _grid(half: int, target_half: int) -> np.ndarray:
    """Positions -d_n .. -d_1, 0, d_1 .. d_n with d_k = 1 + q + ... + q^(k-1)."""
    left, right = 1.01, 1.5
    ratio = left
    while right - left > 1e-6:
        ratio = (left + right) / 2
        if (1 - ratio**half) / (1 - ratio) > target_half:
            right = ratio
        else:
            left = ratio
    distances = np.cumsum([ratio**power for power in range(half)])
    return np.concatenate([-distances[::-1], [0.0], distances])


def _side(rows: int, what: str) -> int:
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise CheckpointError(f"{what} has {rows} relative positions, which is not the square of an odd number.")
    return side
