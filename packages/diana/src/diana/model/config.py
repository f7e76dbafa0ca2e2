"""The configuration of a DiaNA model: what `config.json` of a checkpoint folder holds."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diana.model.folders import resolve_folder
from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import write_json

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
SIM_TYPES = ("avg", "max", "min", "lsp_max", "lsp_min")
DROP_PATH_SCHEDULES = ("constant", "linear")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")

# Written to every config.json; on reading they are derived anew, whatever the file says.
_DERIVED = ("architectures", "hidden_size", "model_type")
_PARTS = ("vision_config", "llama_config", "refiner_config")
_REFINER_DEFAULTS = {"enable": False, "num_query": 32, "num_hidden_layers": 2, "sim_type": "avg", "enable_sdm": False}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class DiaNAConfig:
    """Settings of the towers, the refiner and the losses.

    Unknown keyword arguments become attributes and are written back by `to_dict`, so that a released config.json (which
    holds some forty settings of an old transformers version) survives a round trip.

    Args:
        vision_config: arguments of `transformers.Swinv2Config`; absent ones take that class's defaults.
            `drop_path_schedule` (`constant`, the default, or `linear`) is DiaNA's own.
        llama_config: arguments of `transformers.LlamaConfig`.
        refiner_config: `enable_refiner` (default: `enable`, default False), `num_query` (32), `num_hidden_layers` (2),
            `sim_type` ("avg"), `enable_sdm` (False).
        embed_dim: width D of the joint space.
        logit_scale: start value of the inverse temperature.
        enable_sdm: add the SDM loss to the contrastive loss of the global features.
        use_llama_lora: rank of LoRA adapters on the Llama tower, 0 for none.
        extras: further entries of config.json, kept as attributes. `dtype` (or `torch_dtype`): of the checkpoint.
            `attn_implementation`: `auto`, `sdpa`, `eager` or `flash_attention_2` for the Llama tower.
            `rotary_dtype`: precision of the rotary frequencies, by default that of the checkpoint: the released code
            casts the whole model, and weights trained with rounded frequencies expect them.

    Raises:
        InputError: a part is not a mapping, or a value cannot be used.
    """

    def __init__(
        self,
        vision_config: Mapping[str, Any],
        llama_config: Mapping[str, Any],
        refiner_config: Mapping[str, Any],
        embed_dim: int = 768,
        logit_scale: float = 50,
        enable_sdm: bool = False,
        use_llama_lora: int = 0,
        **extras: Any,
    ) -> None:
        for name, part in zip(_PARTS, (vision_config, llama_config, refiner_config)):
            if not isinstance(part, Mapping):
                raise InputError(f"{name} of a DiaNA configuration must be a mapping, not {type(part).__name__}.")
        self.vision_config: dict[str, Any] = copy.deepcopy(dict(vision_config))
        self.llama_config: dict[str, Any] = copy.deepcopy(dict(llama_config))
        self.refiner_config: dict[str, Any] = {**_REFINER_DEFAULTS, **copy.deepcopy(dict(refiner_config))}
        self.refiner_config.setdefault("enable_refiner", self.refiner_config["enable"])
        self.embed_dim = embed_dim
        self.logit_scale = logit_scale
        self.enable_sdm = enable_sdm
        self.use_llama_lora = use_llama_lora
        self.attn_implementation = extras.pop("attn_implementation", None) or "auto"
        for name, value in extras.items():
            if name not in _DERIVED:
                setattr(self, name, copy.deepcopy(value))
        self.rotary_dtype = extras.get("rotary_dtype") or _dtype_name(self.stored_dtype or "float32")
        self._check()

    def _check(self) -> None:
        width = self.embed_dim
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InputError(f"embed_dim of a DiaNA configuration must be a positive whole number, not {width!r}.")
        if not isinstance(self.logit_scale, (int, float)) or not self.logit_scale > 0:
            raise InputError(f"logit_scale of a DiaNA configuration must be above 0, not {self.logit_scale!r}.")
        rank = self.use_llama_lora
        if not isinstance(rank, int) or rank < 0:
            raise InputError(f"use_llama_lora of a DiaNA configuration must be a rank of 0 or more, not {rank!r}.")
        queries = self.refiner_config["num_query"]
        if not isinstance(queries, int) or queries < 1:
            raise InputError(f"num_query of a DiaNA configuration must be at least 1, not {queries!r}.")
        _dtype_name(self.rotary_dtype)
        if self.stored_dtype is not None:
            _dtype_name(self.stored_dtype)

    @property
    def enable_refiner(self) -> bool:
        """Whether the model has an adaptive attribute refiner."""
        return bool(self.refiner_config["enable_refiner"])

    @property
    def hidden_size(self) -> int:
        """Width of the Llama tower (accelerate's DeepSpeed integration asks for it under this name)."""
        return self.llama_config.get("hidden_size", 4096)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.vision_config.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def stored_dtype(self) -> str | None:
        """Name of the checkpoint's dtype as the file gives it: `dtype`, or the older `torch_dtype`."""
        return getattr(self, "dtype", None) or getattr(self, "torch_dtype", None)

    @property
    def checkpoint_dtype(self) -> "torch.dtype | None":
        """Dtype of the checkpoint; None if the file does not tell."""
        import torch

        return None if self.stored_dtype is None else getattr(torch, _dtype_name(self.stored_dtype))

    def to_dict(self) -> dict[str, Any]:
        """Everything config.json holds, as plain values; the dtype under its new and its old name."""
        values = {
            name: copy.deepcopy(value) for name, value in vars(self).items() if name not in ("dtype", "torch_dtype")
        }
        dtype = None if self.stored_dtype is None else _dtype_name(self.stored_dtype)
        return {
            **values,
            "hidden_size": self.hidden_size,
            "dtype": dtype,
            "torch_dtype": dtype,
            "model_type": "main",
            "architectures": ["DiaNAModel"],
        }

    def to_json_string(self) -> str:
        """`to_dict` as JSON (loggers of transformers ask for it)."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/config.json`, whole or not at all."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> "DiaNAConfig":
        """Read config.json of a folder, of its newest `checkpoint-N`, or of a repository on the Hugging Face hub.

        Raises:
            CheckpointError: there is none, or it is not a configuration of DiaNA.
        """
        return cls.from_file(resolve_folder(source, weights=False) / CONFIG_NAME)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "DiaNAConfig":
        """Read one JSON file; errors as `from_pretrained`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path.") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again.") from error
        missing = [name for name in _PARTS if not isinstance(values, dict) or not isinstance(values.get(name), dict)]
        if missing:
            raise CheckpointError(f"{path} is not a configuration of DiaNA: it is missing {', '.join(missing)}.")
        try:
            return cls(**values)
        except (InputError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from error

    def __repr__(self) -> str:
        return f"DiaNAConfig {self.to_json_string()}"


def _dtype_name(value: Any) -> str:
    """`float32` from "float32", "torch.float32" or torch.float32."""
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"The dtype {value!r} of a DiaNA configuration must be one of {', '.join(_DTYPES)}.")
    return name
