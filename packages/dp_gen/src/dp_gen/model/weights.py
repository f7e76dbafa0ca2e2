"""Weights in the authors' layout: reading every form in which they come, and writing it.

Two names differ between their stack and today's: the VAE's attention had older ones, and the text encoder of a
Stable Diffusion folder has a prefix. FastComposer's checkpoints call the controller `postfuse_module`.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly

_VAE_ATTENTION = re.compile(r"(vae\.(?:encoder|decoder)\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.")
_NEW_VAE_ATTENTION = re.compile(r"(vae\.(?:encoder|decoder)\.mid_block\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
_TO_NEW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_TO_OLD = {new: old for old, new in _TO_NEW.items()}

STATE_FILES = ("model.safetensors", "pytorch_model.bin")
_PART_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_PARTS = ("text_encoder", "image_encoder", "vae", "unet", "controller")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the writers of weights raise on a full disk into an `OSError` that names the folder and the free space.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(errno.EIO, f"weights cannot be written: {reason}; {free:.1f} GB are free", str(path)) from error


def load_checkpoint(model: torch.nn.Module, source: Any, strict: bool = True) -> None:
    """Load weights into a `DiversePersonModel`.

    Args:
        model: receives the weights, converted to its own dtypes.
        source: a state dict; a `.safetensors`, `.bin` or `.pt` file; an accelerate checkpoint folder; or a final folder
            of the training. The authors' names and FastComposer's are understood.
        strict: otherwise parameters that the source lacks keep their values, and unknown names are left aside.

    Raises:
        CheckpointError: the source cannot be read or does not fit; the model is unchanged then.
    """
    named = "the state dict" if isinstance(source, Mapping) else str(source)
    state = read_weights(source)
    if not strict:
        own = model.state_dict()
        state = {name: tensor for name, tensor in state.items() if name in own}
    load_state_dict_strictly(model, state, source=named, may_be_missing=lambda name: not strict)


def read_weights(source: Any) -> dict[str, Tensor]:
    """Weights under the model's own names, from any source of `load_checkpoint`.

    Raises:
        CheckpointError: the source cannot be read.
    """
    if isinstance(source, Mapping):
        return normalise(find_state_dict(source)[0])
    path = Path(source)
    if not path.is_dir():
        return normalise(find_state_dict(load_checkpoint_file(path), source=str(path))[0])
    state = _folder_weights(path)
    if state is None:
        raise CheckpointError(
            f"{path} holds neither a checkpoint ({' or '.join(STATE_FILES)}) nor a trained pipeline "
            f"({', '.join(_PARTS)}): name a folder that train.py wrote"
        )
    return normalise(state)


def _folder_weights(folder: Path) -> dict[str, Tensor] | None:
    for name in STATE_FILES:
        if (folder / name).is_file():
            return find_state_dict(load_checkpoint_file(folder / name), source=str(folder / name))[0]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(index)
    if not all((folder / part).is_dir() for part in _PARTS):
        return None
    state: dict[str, Tensor] = {}
    for part in _PARTS:
        weights = next(((folder / part / name) for name in _PART_FILES if (folder / part / name).is_file()), None)
        index = next(((folder / part).glob("*.index.json")), None)
        if weights is None and index is None:
            raise CheckpointError(f"{folder / part} holds no weights: copy the folder again, or give another one")
        found = load_checkpoint_file(weights) if weights is not None else _sharded(index)  # type: ignore[arg-type]
        state.update({f"{part}.{name}": tensor for name, tensor in found.items()})
    return state


def _sharded(index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({error}): copy it again") from error
    state: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file}, which is not next to it: give another checkpoint")
        state.update(find_state_dict(load_checkpoint_file(index.parent / file), source=str(index.parent / file))[0])
    return state


def normalise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any known layout under the names of `DiversePersonModel`."""
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name.startswith("ema_param.") or name.endswith(".position_ids"):
            continue
        if name.startswith("postfuse_module."):
            name = "controller." + name.removeprefix("postfuse_module.")
        if name.startswith("text_encoder.text_model."):
            name = "text_encoder." + name.removeprefix("text_encoder.text_model.")
        renamed = _VAE_ATTENTION.sub(lambda match: f"{match[1]}{_TO_NEW[match[2]]}.", name)
        if _NEW_VAE_ATTENTION.match(renamed) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # some files hold these as 1x1 convolutions
        own[renamed] = tensor
    return own


def official_layout(state: Mapping[str, Tensor], *, controller: str = "controller") -> dict[str, Tensor]:
    """Weights under the authors' names, from the model's own names; with both `position_ids` buffers.

    Args:
        state: as `DiversePersonModel.state_dict()` or `read_weights` gives it.
        controller: the controller's prefix; `postfuse_module` for FastComposer.
    """
    official: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("controller."):
            name = f"{controller}." + name.removeprefix("controller.")
        name = _NEW_VAE_ATTENTION.sub(lambda match: f"{match[1]}{_TO_OLD[match[2]]}.", name)
        official[name] = tensor
        if name.endswith(".embeddings.position_embedding.weight"):
            buffer = name.replace("position_embedding.weight", "position_ids")
            official[buffer] = torch.arange(len(tensor), dtype=torch.int64)[None]
    return official


def official_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights in the layout that the authors' code loads strictly."""
    return official_layout(model.state_dict())
