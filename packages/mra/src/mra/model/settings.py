"""The sizes of the network, read from a configuration and checked before anything is built."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tbps_common.datasets import read_json
from tbps_common.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]

RegionFeatures = Literal["released", "paper"]
REGION_FEATURES = get_args(RegionFeatures)
# With this projection width the heads are single linear layers (the RSTPReid configuration).
LINEAR_HEAD_WIDTH = 256

Whole = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def find_shipped(path: str | os.PathLike[str]) -> Path:
    """`path` if it exists, else the copy of a `configs/...` file in the package, else `path` unchanged.

    So a folder with its own `configs/` overrides the released sizes, and everywhere else the released ones are found.
    """
    given = Path(path)
    if given.exists() or given.is_absolute() or given.parts[:1] != ("configs",):
        return given
    own = PACKAGE / given
    return own if own.is_file() else given


class Settings(BaseModel):
    """Typed entries of a configuration; entries that it does not name are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def from_config(cls, entries: Mapping[str, Any], name: str = "the configuration") -> Self:
        """Read and check the entries.

        Args:
            entries: of a YAML or JSON file.
            name: how messages call that file.

        Raises:
            InputError: one sentence that names the file, the key, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(entries))
        except ValidationError as error:
            first = error.errors()[0]
            key, cause = ".".join(map(str, first["loc"])), first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):  # of a file that this one names
            raise cause
        if cause is not None:
            raise InputError(f"{name}: {cause}")
        if first["type"] == "missing":
            raise InputError(f"{name} has no key {key}: add it")
        allowed = first["msg"].replace("Input should", "must")
        raise InputError(f"{name}: {key} {allowed}, but it is {first['input']!r}")


def _from_file(settings: type[Settings], key: str) -> BeforeValidator:
    """Read the settings from an inline mapping, or from the JSON file at a path."""

    def read(value: Any) -> Settings:
        if isinstance(value, Mapping):
            return settings.from_config(value, key)
        if not isinstance(value, (str, os.PathLike)):
            raise InputError(f"{key} must be the path of a JSON file or a mapping, but it is {value!r}")
        content = read_json(find_shipped(value))
        if not isinstance(content, dict):
            raise InputError(f"{os.fspath(value)} must hold a JSON object, but it holds a {type(content).__name__}")
        return settings.from_config(content, os.fspath(value))

    return BeforeValidator(read)


class VisionSettings(Settings):
    """Sizes of the Swin image encoder (the JSON file of `vision_config`)."""

    height: Whole = Field(alias="h")
    width: Whole = Field(alias="w")
    window: Whole = Field(alias="window_size")
    embed_dim: Whole
    depths: list[Whole] = Field(min_length=4, max_length=4)
    num_heads: list[Whole] = Field(min_length=4, max_length=4)
    drop_rate: Share = 0.0
    drop_path_rate: Share = 0.0
    feature_width: Whole = Field(alias="vision_width")
    start_weights: str = Field("", alias="ckpt")

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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.feature_width != 8 * self.embed_dim:
            raise ValueError(
                f"vision_width is {self.feature_width}, but four stages of embed_dim {self.embed_dim} end with "
                f"{8 * self.embed_dim} channels"
            )
        if self.height % 32 or self.width % 32:
            raise ValueError(f"h and w must be multiples of 32, but they are {self.height} and {self.width}")
        for stage, ((rows, columns), (window, _), heads) in enumerate(zip(self.grids, self.windows, self.num_heads)):
            if rows % window or columns % window:
                raise ValueError(
                    f"the {rows} x {columns} tokens of stage {stage} cannot be cut into windows of {window}: choose "
                    "another window_size, h or w"
                )
            if (self.embed_dim << stage) % heads:
                raise ValueError(f"{heads} heads do not divide the {self.embed_dim << stage} channels of stage {stage}")
        if self.num_tokens < 3:
            raise ValueError(f"{self.height} x {self.width} pixels give fewer than 3 final tokens: enlarge h")
        return self


class TextSettings(Settings):
    """Sizes of the BERT text and fusion encoder (the JSON file of `text_config`, with the names of transformers)."""

    vocab_size: Whole
    hidden_size: Whole
    num_hidden_layers: Whole
    fusion_layer: Whole
    num_attention_heads: Whole
    intermediate_size: Whole
    max_position_embeddings: Whole
    type_vocab_size: Whole = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        if self.fusion_layer >= self.num_hidden_layers:
            raise ValueError(
                f"fusion_layer {self.fusion_layer} leaves none of the {self.num_hidden_layers} layers for cross-attention"
            )
        return self


class ModelSettings(Settings):
    """What of a task's configuration decides the network and its losses."""

    vision: Annotated[VisionSettings, _from_file(VisionSettings, "vision_config")] = Field(alias="vision_config")
    text: Annotated[TextSettings, _from_file(TextSettings, "text_config")] = Field(alias="text_config")
    text_encoder: str = ""
    embed_dim: Whole
    temp: float = Field(0.07, gt=0)
    itc_dop: Share = 0.0
    label_smoothing: Share = Field(0.0, alias="LabelSmooth")
    region: float = Field(0.0, ge=0)
    region_feat: RegionFeatures = "released"
    eda: bool = False
    max_tokens: int = Field(56, ge=4)
    init_cross: bool = False
    lr_2: bool = False
    load_params: bool = False
    gradient_checkpointing: bool = False

    @property
    def linear_heads(self) -> bool:
        """Whether the projections are single linear layers of the first token."""
        return self.embed_dim == LINEAR_HEAD_WIDTH

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_tokens > self.text.max_position_embeddings:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, but text_config has only {self.text.max_position_embeddings} positions"
            )
        if self.lr_2 and self.text.num_hidden_layers < 12:
            raise ValueError(f"lr_2 names text layers up to 11, but text_config has only {self.text.num_hidden_layers}")
        return self
