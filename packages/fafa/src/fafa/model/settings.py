"""What a model is built from: the built-in backbones, YAML files of the same form, checks. Needs no torch.

A mapping (the content of `model:` in a YAML file) becomes `ModelSettings`, the one place of all defaults.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from tbps_common.errors import InputError
from tbps_common.files import atomic_path, write_text

logger = logging.getLogger("fafa.model")

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
BERT = "bert-base-uncased"
HF_PREFIX = "hf:"
MODEL_NAME = "blip2_fafa_cpr"
MODEL_CONFIG = "model_config.yaml"
"""Name of a run's own model file."""


@dataclass(frozen=True)
class QFormerSettings:
    """Sizes of the Q-Former; the defaults are those of bert-base-uncased."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    init_from: str | None = BERT


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides the model and its start weights.

    Attributes:
        arch: free text.
        load_finetuned: start from `finetuned`, a file of the whole model.
        load_pretrained: start from `pretrained` (unless `load_finetuned`).
        pretrained: URL or path in LAVIS layout, or `hf:` and a repository or folder; empty: nothing.
        finetuned: likewise.
        vit_weights: URL or path of a file of the bare ViT.
        vit_model: `eva_clip_g` or `clip_L`.
        image_size: image side in pixels.
        patch_size: patch side in pixels.
        vit_width: width of the ViT.
        vit_depth: its number of blocks.
        vit_heads: its number of heads.
        vit_mlp_ratio: hidden width of its MLPs over its width (`clip_L`: always 4).
        drop_path_rate: stochastic depth of the last block (`eva_clip_g` only), falling linearly to 0 at the first.
        use_grad_checkpoint: recompute a trained ViT's blocks in the backward pass.
        vit_precision: `fp16`, `bf16` or `fp32` of a frozen ViT's matrices on a GPU.
        freeze_vit: do not train the ViT.
        num_query_token: number of query tokens (T).
        cross_attention_freq: every how many Q-Former layers see the image.
        embed_dim: width of the compared features (D).
        max_txt_len: length in tokens to which captions are cut and padded.
        tokenizer: vocabulary file, folder with one, or hub name.
        qformer: the Q-Former's sizes.
        mfr_hidden_dim: hidden width of the masked-feature predictor.
        mfr_mask_ratio: share of hidden elements in MFR.
        fd_sample_size: tokens drawn for FD.
        dsu_p: probability of DSU.
        use_hnnce: hard-negative NCE in place of SDM.
        use_mlm: compute MFR.
        use_mmd: compute MMD.
        use_coral: compute CORAL.
        use_sdm: SDM (else cross-entropy against the diagonal).
        use_dsu: noise on the target tokens in training.
        use_soft: mean of the best `fda_k` tokens (else the best token).
        use_dispersion: compute FD.
        fda_k: tokens that count in the similarity.
        fd_margin: margin of FD.
    """

    image_size: int
    num_query_token: int
    arch: str = ""
    load_finetuned: bool = False
    load_pretrained: bool = True
    pretrained: str | None = None
    finetuned: str | None = None
    vit_weights: str | None = None
    vit_model: str = "eva_clip_g"
    patch_size: int = 14
    vit_width: int = 1408
    vit_depth: int = 39
    vit_heads: int = 16
    vit_mlp_ratio: float = 4.3637
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: str = "fp16"
    freeze_vit: bool = True
    cross_attention_freq: int = 2
    embed_dim: int = 256
    max_txt_len: int = 32
    tokenizer: str = BERT
    qformer: QFormerSettings = field(default_factory=QFormerSettings)
    mfr_hidden_dim: int = 512
    mfr_mask_ratio: float = 0.3
    fd_sample_size: int = 1024
    dsu_p: float = 0.8
    use_hnnce: bool = False
    use_mlm: bool = True
    use_mmd: bool = False
    use_coral: bool = False
    use_sdm: bool = True
    use_dsu: bool = True
    use_soft: bool = True
    use_dispersion: bool = True
    fda_k: int = 6
    fd_margin: float = 0.5

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the model configuration") -> "ModelSettings":
        """Settings from the content of `model:`; relative paths stay as they are.

        Raises:
            InputError: a required key is missing, or a value has the wrong type or is impossible.
        """
        if not isinstance(mapping, Mapping):
            raise InputError(f"{source} must be a mapping of settings, but it is a {type(mapping).__name__}.")
        given = {key: value for key, value in mapping.items() if value is not None or key in _MAY_BE_NULL}
        for key in ("image_size", "num_query_token"):
            if key not in given:
                raise InputError(f"{source} has no '{key}': add it (the paper's model: {_PAPER[key]}).")
        inner = given.pop("qformer", {})
        if not isinstance(inner, Mapping):
            raise InputError(f"{source}: 'qformer' must be a mapping of sizes, but it is {inner!r}.")
        if any(key in inner for key in _QFORMER_SIZES):
            inner = {"init_from": None, **inner}
        if not any(key in given for key in _VIT_SIZES):
            given = {"vit_weights": _VIT_FILES.get(str(given.get("vit_model", "eva_clip_g"))), **given}
        if given.get("vit_model") == "clip_L":
            given = {**_CLIP_SIZES, **given}
        values = _checked(cls, given, source)
        return cls(
            **values, qformer=QFormerSettings(**_checked(QFormerSettings, inner, f"{source}, qformer"))
        )._checked(source)

    def _checked(self, source: str) -> "ModelSettings":
        def require(condition: bool, text: str) -> None:
            if not condition:
                raise InputError(f"{source}: {text}.")

        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, f"'{name}' must be one of {', '.join(allowed)}, but it is {value!r}")
        for owner in (self, self.qformer):
            for name in _POSITIVE & {item.name for item in fields(owner)}:
                require(getattr(owner, name) >= 1, f"'{name}' must be at least 1, but it is {getattr(owner, name)}")
        for owner in (self, self.qformer):
            for name in _SHARES & {item.name for item in fields(owner)}:
                value = getattr(owner, name)
                require(0 <= value <= 1, f"'{name}' must lie between 0 and 1, but it is {value}")
        require(
            self.image_size % self.patch_size == 0,
            f"'image_size' {self.image_size} is not a multiple of 'patch_size' {self.patch_size}",
        )
        require(
            self.vit_width % self.vit_heads == 0,
            f"'vit_width' {self.vit_width} is not a multiple of 'vit_heads' {self.vit_heads}",
        )
        heads = self.qformer.num_attention_heads
        require(
            self.qformer.hidden_size % heads == 0,
            f"qformer: 'hidden_size' {self.qformer.hidden_size} is not a multiple of 'num_attention_heads' {heads}",
        )
        limit = self.qformer.max_position_embeddings
        require(
            2 <= self.max_txt_len <= limit,
            f"'max_txt_len' {self.max_txt_len} must lie between 2 and 'max_position_embeddings' {limit}",
        )
        require(
            self.vit_model == "eva_clip_g" or self.drop_path_rate == 0,
            "'drop_path_rate' needs 'vit_model: eva_clip_g'",
        )
        return self

    def without_start_weights(self) -> "ModelSettings":
        """For a model whose weights all come from a checkpoint: nothing is fetched to start from."""
        inner = replace(self.qformer, init_from=None)
        return replace(self, load_finetuned=False, load_pretrained=False, vit_weights=None, qformer=inner)

    def to_mapping(self) -> dict[str, Any]:
        """All settings as plain values, the form of a YAML file's `model:`."""
        return asdict(self)


# A ViT of other than the standard sizes, or a Q-Former of other than BERT's, has no weights to start from by default.
_VIT_SIZES = ("vit_width", "vit_depth", "vit_heads", "vit_mlp_ratio")
_CLIP_SIZES = {"vit_width": 1024, "vit_depth": 23, "vit_heads": 16, "vit_mlp_ratio": 4.0}
_QFORMER_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_VIT_FILES = {"eva_clip_g": LAVIS_URL + "eva_vit_g.pth", "clip_L": LAVIS_URL + "clip_vit_L.pth"}
_MAY_BE_NULL = {"vit_weights"}
_CHOICES = {"vit_model": ("eva_clip_g", "clip_L"), "vit_precision": ("fp16", "bf16", "fp32")}
_POSITIVE = {
    "image_size", "patch_size", "vit_width", "vit_depth", "vit_heads", "num_query_token", "cross_attention_freq",
    "embed_dim", "mfr_hidden_dim", "fd_sample_size", "fda_k", *_QFORMER_SIZES,
}  # fmt: skip
_SHARES = {"drop_path_rate", "mfr_mask_ratio", "dsu_p", "hidden_dropout_prob", "attention_probs_dropout_prob"}
_PAPER = {"image_size": 224, "num_query_token": 32}

_STANDARD = {"image_size": 224, "num_query_token": 32}
BACKBONES: dict[str, dict[str, Any]] = {
    "pretrain": {**_STANDARD, "arch": "pretrain", "pretrained": LAVIS_URL + "blip2_pretrained.pth"},
    "pretrain_vitL": {
        **_STANDARD,
        "arch": "pretrain_vitL",
        "vit_model": "clip_L",
        "pretrained": LAVIS_URL + "blip2_pretrained_vitL.pth",
    },
    "coco": {
        **_STANDARD,
        "arch": "coco",
        "image_size": 364,
        "use_grad_checkpoint": True,
        "vit_precision": "fp32",
        "freeze_vit": False,
        "load_finetuned": True,
        "pretrained": LAVIS_URL + "blip2_pretrained.pth",
        "finetuned": LAVIS_URL + "blip2_finetune_coco.pth",
    },
}


def _checked(cls: type, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values of the fields of `cls`, of the right type; a key it does not know is reported and left out."""
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in types or key == "qformer":
            close = get_close_matches(str(key), types, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            logger.warning("%s: the key '%s' is not known and has no effect%s.", source, key, hint)
            continue
        values[key] = _of_type(types[key], value, f"{source}: '{key}'")
    return values


def _of_type(wanted: Any, value: Any, name: str) -> Any:
    accepted = get_args(wanted) or (wanted,)
    if float in accepted and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-12 (without a point) as text.
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, accepted) and not (isinstance(value, bool) and bool not in accepted):
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[accepted[0]]
    raise InputError(f"{name} must be {kind}, but it is {value!r}.")


def read_settings(backbone: str | os.PathLike[str], **overrides: Any) -> ModelSettings:
    """Settings of a built-in backbone or of a YAML file, with absolute paths.

    Args:
        backbone: `pretrain`, `pretrain_vitL`, `coco`, or the path of a YAML file (content under `model:`).
        **overrides: values in place of the configuration's; None: not given.

    Raises:
        InputError: neither a built-in name nor a readable YAML file, or a setting in it is wrong.
    """
    name = os.fspath(backbone)
    if name in BACKBONES:
        mapping, folder, source = BACKBONES[name], None, f"backbone '{name}'"
    else:
        mapping, folder, source = _read_yaml(name), Path(name).resolve().parent, name
    given = {key: value for key, value in overrides.items() if value is not None}
    settings = ModelSettings.from_mapping({**mapping, **given}, source)
    if folder is None:
        return settings
    changes = {key: _anchored(getattr(settings, key), folder) for key in ("tokenizer", *_WEIGHTS)}
    return replace(settings, **changes)


_WEIGHTS = ("pretrained", "finetuned", "vit_weights")


def _anchored(value: str | None, folder: Path) -> str | None:
    """An existing file relative to the YAML's folder, else relative to the working directory, else as it is."""
    if not value or "://" in value:
        return value
    prefix = HF_PREFIX if value.startswith(HF_PREFIX) else ""
    for base in (folder, Path.cwd()):
        candidate = base / Path(value.removeprefix(prefix)).expanduser()
        if candidate.exists():
            return prefix + str(candidate.resolve())
    return value


def read_model_config(backbone: str | os.PathLike[str], **overrides: Any) -> dict[str, Any]:
    """`read_settings` as the complete mapping that `Blip2FAFACPR.from_config` takes."""
    return read_settings(backbone, **overrides).to_mapping()


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"Backbone '{name}' is neither {', '.join(BACKBONES)} nor a YAML file that exists; check --backbone."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path} is not a readable YAML file{where}; correct it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{path} has no mapping under 'model:'; see the README for the form of a model file.")
    return content["model"]


def write_model_config(mapping: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `model_config.yaml` for a run's folder, usable when everything else is gone.

    A vocabulary file is copied to `vocab.txt`; start weights are dropped, because the run's checkpoints hold them all.

    Returns:
        The path of the file.
    """
    target = Path(folder)
    settings = ModelSettings.from_mapping(mapping)
    tokenizer = settings.tokenizer
    vocabulary = Path(tokenizer) / "vocab.txt" if Path(tokenizer).is_dir() else Path(tokenizer)
    if vocabulary.is_file():
        with atomic_path(target / "vocab.txt") as temporary:
            shutil.copyfile(vocabulary, temporary)
        tokenizer = "vocab.txt"
    alone = replace(settings.without_start_weights(), tokenizer=tokenizer)
    path = target / MODEL_CONFIG
    write_text(path, yaml.safe_dump({"model": alone.to_mapping()}, sort_keys=False, allow_unicode=True))
    return path
