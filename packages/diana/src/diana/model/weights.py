"""Files of a checkpoint folder: reading them, fitting them to a model, writing them."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diana.model.config import DiaNAConfig
from diana.model.folders import WEIGHT_FILES
from tbps_common.errors import CheckpointError
from tbps_common.files import atomic_path
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly

logger = logging.getLogger("diana.model")

QUERY_TOKEN = "refiner.attr_query_token"

# Computed, not learnt; and a name that only early checkpoints have.
_IGNORED_ENDINGS = (".relative_coords_table", ".relative_position_index", "rotary_emb.inv_freq")
_IGNORED = ("refiner.query_token",)
# A checkpoint of full size names the backbones it was made from; transformers 4.45 looks them up when loading.
_HUB_BACKBONES = {
    "vision_config": ("embed_dim", 128, "microsoft/swinv2-base-patch4-window12-192-22k"),
    "llama_config": ("hidden_size", 2048, "meta-llama/Llama-3.2-1B"),
}


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from shards with an index; safetensors are mapped, not read.

    Raises:
        CheckpointError: there is no weight file, or one is missing, damaged or not plain data.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights ({', '.join(WEIGHT_FILES)}); give another folder.")
    files = _shards(found) if found.suffix == ".json" else [found]
    state: dict[str, Tensor] = {}
    for file in files:
        part, _ = find_state_dict(load_checkpoint_file(file, mmap=file.suffix == ".safetensors"), source=str(file))
        state.update(part)
    return state


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(names))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of weight shards; copy or download it again.") from error
    for name in shards:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not in its folder; download it again.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, but {index.name} lists it; download it again.")
    return [index.parent / name for name in shards]


def floating_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Dtype of the first floating-point tensor; float32 if there is none."""
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Fit the tensors of a DiaNA checkpoint to a model, by the rules that `DiaNAModel.from_pretrained` gives.

    Raises:
        CheckpointError: names or shapes do not fit; nothing of the model has changed.
    """
    state = without_buffers(state)
    has_refiner = any(name.startswith("refiner.") for name in model.state_dict())
    if not has_refiner:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("refiner.")}
    brings_refiner = any(name.startswith("refiner.") for name in state)

    def may_be_missing(name: str) -> bool:
        return name == QUERY_TOKEN or (not brings_refiner and name.startswith("refiner."))

    liberties = load_state_dict_strictly(
        model,
        state,
        source=source,
        may_be_missing=may_be_missing,
        skip_shape_mismatch=lambda name: name == QUERY_TOKEN,
    )
    for sentence in liberties:
        logger.warning("%s", sentence)


def load_backbone(tower: nn.Module, folder: Path, prefix: str, heads: tuple[str, ...]) -> None:
    """Load one tower from its own checkpoint folder.

    Args:
        tower: Swinv2Model or LlamaModel.
        folder: of the backbone.
        prefix: of the names in a checkpoint that holds the tower inside another model.
        heads: beginnings of names that belong to that other model alone.

    Raises:
        CheckpointError: as `read_state`, or names or shapes do not fit.
    """
    state = {name: tensor for name, tensor in read_state(folder).items() if not name.startswith(heads)}
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    load_state_dict_strictly(tower, without_buffers(state), source=str(folder))


def without_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The learnt tensors of a checkpoint."""
    return {
        name: tensor for name, tensor in state.items() if not name.endswith(_IGNORED_ENDINGS) and name not in _IGNORED
    }


def save(
    config: DiaNAConfig,
    state: Mapping[str, Tensor],
    towers: Mapping[str, Mapping[str, Any]],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Write weights, then config.json: a folder with both is complete.

    Args:
        config: of the model.
        state: official names.
        towers: complete settings of `vision_config` and `llama_config`; the configuration's own take precedence.
        folder: is created.
        dtype: of the saved floating-point tensors; None keeps theirs.
    """
    tensors = {}
    for name, tensor in state.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", wanted).contiguous()
    values = config.to_dict()
    for part, complete in towers.items():
        values[part] = {**complete, **values[part]}
        key, size, hub_name = _HUB_BACKBONES[part]
        values[part].pop("pretrained", None)
        if values[part].get(key) == size:
            values[part]["pretrained"] = hub_name
    saved_dtype = str(floating_dtype(tensors)).removeprefix("torch.")
    complete_config = DiaNAConfig(**{**values, "dtype": saved_dtype, "torch_dtype": saved_dtype})
    with atomic_path(folder / WEIGHT_FILES[0]) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    complete_config.save_pretrained(folder)
