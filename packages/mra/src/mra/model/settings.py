"""The sizes of the network, read from a configuration and checked before anything is built."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra.shipped import find_shipped
from tbps_common.errors import InputError

# With this projection width the heads are single linear layers (the RSTPReid configuration).
LINEAR_HEAD_WIDTH = 256
REGION_FEATURES = ("released", "paper")


@dataclass(frozen=True)
class VisionSettings:
    """Sizes of the Swin image encoder (the JSON file of `vision_config`)."""

    height: int
    width: int
    window: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_rate: float
    drop_path_rate: float
    feature_width: int
    start_weights: str

    @classmethod
    def from_config(cls, value: Any) -> "VisionSettings":
        """Read an inline mapping or the JSON file at a path.

        Raises:
            InputError: a key is missing or the sizes cannot work.
        """
        name, entries = _mapping(value, "vision_config")
        settings = cls(
            height=_whole(entries, "h", name),
            width=_whole(entries, "w", name),
            window=_whole(entries, "window_size", name),
            embed_dim=_whole(entries, "embed_dim", name),
            depths=_wholes(entries, "depths", name),
            num_heads=_wholes(entries, "num_heads", name),
            drop_rate=_share(entries, "drop_rate", name, 0.0),
            drop_path_rate=_share(entries, "drop_path_rate", name, 0.0),
            feature_width=_whole(entries, "vision_width", name),
            start_weights=str(entries.get("ckpt", "")),
        )
        settings._check(name)
        return settings

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Window side and shift (of every second block) of each stage.

        The last stage halves a window of 8; a stage no larger than its window in one direction has one window of that
        size and no shift.
        """
        result = []
        for stage, (rows, columns) in enumerate(self.grids):
            window = 4 if self.window == 8 and stage == len(self.depths) - 1 else self.window
            smallest = min(rows, columns)
            result.append((smallest, 0) if smallest <= window else (window, window // 2))
        return result

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each stage."""
        return [(self.height // (4 << stage), self.width // (4 << stage)) for stage in range(len(self.depths))]

    @property
    def num_tokens(self) -> int:
        """Tokens after the last stage."""
        rows, columns = self.grids[-1]
        return rows * columns

    def _check(self, name: str) -> None:
        stages = len(self.depths)
        if stages != 4 or len(self.num_heads) != stages:
            raise InputError(f"{name}: depths and num_heads must both hold 4 numbers, one per stage.")
        if self.feature_width != 8 * self.embed_dim:
            raise InputError(
                f"{name}: vision_width is {self.feature_width}, but four stages of embed_dim {self.embed_dim} end with "
                f"{8 * self.embed_dim} channels."
            )
        if self.height % 32 or self.width % 32:
            raise InputError(f"{name}: h and w must be multiples of 32, but they are {self.height} and {self.width}.")
        for stage, ((rows, columns), (window, _), heads) in enumerate(zip(self.grids, self.windows, self.num_heads)):
            if rows % window or columns % window:
                raise InputError(
                    f"{name}: the {rows} x {columns} tokens of stage {stage} cannot be cut into windows of {window}: "
                    "choose another window_size, h or w."
                )
            if (self.embed_dim << stage) % heads:
                raise InputError(
                    f"{name}: {heads} heads do not divide the {self.embed_dim << stage} channels of stage {stage}."
                )
        if self.num_tokens < 3:
            raise InputError(f"{name}: {self.height} x {self.width} pixels give fewer than 3 final tokens; enlarge h.")


@dataclass(frozen=True)
class TextSettings:
    """Sizes of the BERT text and fusion encoder (the JSON file of `text_config`)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    fusion_layer: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int
    hidden_act: str
    hidden_dropout: float
    attention_dropout: float
    layer_norm_eps: float
    initializer_range: float
    pad_token_id: int

    @classmethod
    def from_config(cls, value: Any) -> "TextSettings":
        """Read an inline mapping or the JSON file at a path.

        Raises:
            InputError: a key is missing or the sizes cannot work.
        """
        name, entries = _mapping(value, "text_config")
        settings = cls(
            vocab_size=_whole(entries, "vocab_size", name),
            hidden_size=_whole(entries, "hidden_size", name),
            num_layers=_whole(entries, "num_hidden_layers", name),
            fusion_layer=_whole(entries, "fusion_layer", name),
            num_heads=_whole(entries, "num_attention_heads", name),
            intermediate_size=_whole(entries, "intermediate_size", name),
            max_positions=_whole(entries, "max_position_embeddings", name),
            type_vocab_size=_whole(entries, "type_vocab_size", name, 2),
            hidden_act=str(entries.get("hidden_act", "gelu")),
            hidden_dropout=_share(entries, "hidden_dropout_prob", name, 0.1),
            attention_dropout=_share(entries, "attention_probs_dropout_prob", name, 0.1),
            layer_norm_eps=float(entries.get("layer_norm_eps", 1e-12)),
            initializer_range=float(entries.get("initializer_range", 0.02)),
            pad_token_id=int(entries.get("pad_token_id", 0)),
        )
        if settings.hidden_size % settings.num_heads:
            raise InputError(f"{name}: {settings.num_heads} heads do not divide hidden_size {settings.hidden_size}.")
        if settings.fusion_layer >= settings.num_layers:
            raise InputError(
                f"{name}: fusion_layer {settings.fusion_layer} leaves none of the {settings.num_layers} layers for "
                "cross-attention."
            )
        return settings


@dataclass(frozen=True)
class ModelSettings:
    """What of a configuration decides the network and its losses."""

    vision: VisionSettings
    text: TextSettings
    embed_dim: int
    temperature: float
    projection_dropout: float
    label_smoothing: float
    region: float
    region_features: str
    eda: bool
    max_tokens: int
    init_cross: bool
    lr_2: bool
    load_params: bool
    text_encoder: str
    gradient_checkpointing: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSettings":
        """Read and check the keys of a task's YAML file (spec: `configs/*.yaml`).

        Raises:
            InputError: a key is missing or impossible.
        """
        vision = VisionSettings.from_config(_required(config, "vision_config", "the configuration"))
        text = TextSettings.from_config(_required(config, "text_config", "the configuration"))
        name = "the configuration"
        settings = cls(
            vision=vision,
            text=text,
            embed_dim=_whole(config, "embed_dim", name),
            temperature=float(config.get("temp", 0.07)),
            projection_dropout=_share(config, "itc_dop", name, 0.0),
            label_smoothing=_share(config, "LabelSmooth", name, 0.0),
            region=float(config.get("region", 0) or 0),
            region_features=str(config.get("region_feat", "released")),
            eda=bool(config.get("eda", False)),
            max_tokens=_whole(config, "max_tokens", name, 56),
            init_cross=bool(config.get("init_cross", False)),
            lr_2=bool(config.get("lr_2", False)),
            load_params=bool(config.get("load_params", False)),
            text_encoder=str(config.get("text_encoder", "")),
            gradient_checkpointing=bool(config.get("gradient_checkpointing", False)),
        )
        if settings.temperature <= 0:
            raise InputError(f"temp must be positive, but it is {settings.temperature}.")
        if settings.region < 0:
            raise InputError(f"region must not be negative, but it is {settings.region}.")
        if settings.region_features not in REGION_FEATURES:
            raise InputError(
                f"region_feat must be one of {', '.join(REGION_FEATURES)}, but it is {settings.region_features!r}."
            )
        if not 4 <= settings.max_tokens <= text.max_positions:
            raise InputError(
                f"max_tokens is {settings.max_tokens}: it must be at least 4 and at most the {text.max_positions} positions "
                "of text_config."
            )
        if settings.lr_2 and text.num_layers < 12:
            raise InputError(f"lr_2 names text layers up to 11, but text_config has only {text.num_layers}.")
        return settings

    @property
    def linear_heads(self) -> bool:
        """Whether the projections are single linear layers of the first token."""
        return self.embed_dim == LINEAR_HEAD_WIDTH


def _mapping(value: Any, key: str) -> tuple[str, Mapping[str, Any]]:
    """How messages call it, and the entries of an inline mapping or of the JSON file at a path."""
    if isinstance(value, Mapping):
        return key, value
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{key} must be the path of a JSON file or a mapping, but it is {value!r}.")
    path = find_shipped(value)
    return str(value), read_json(path)


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path in the configuration.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): repair it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, but it holds a {type(content).__name__}.")
    return content


def _required(entries: Mapping[str, Any], key: str, name: str) -> Any:
    if entries.get(key) is None:
        raise InputError(f"{name} lacks the key {key}: add it.")
    return entries[key]


def _whole(entries: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = _required(entries, key, name) if default is None else entries.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: {key} must be a whole number of at least 1, but it is {value!r}.")
    return value


def _wholes(entries: Mapping[str, Any], key: str, name: str) -> tuple[int, ...]:
    value = _required(entries, key, name)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name}: {key} must be a list of whole numbers, but it is {value!r}.")
    return tuple(_whole({key: entry}, key, name) for entry in value)


def _share(entries: Mapping[str, Any], key: str, name: str, default: float) -> float:
    value = entries.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{name}: {key} must be a number from 0 to below 1, but it is {value!r}.")
    return float(value)
