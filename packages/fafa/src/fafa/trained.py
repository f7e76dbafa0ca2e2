"""A trained model and how it was trained, opened from a run directory: what inference and search start from."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fafa.options import TRANSFORMS, add_trust_flag
from fafa.training.run_directory import BEST_BY_STEP, HYPERPARAMETERS, WEIGHTS
from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.arguments import whole_number

if TYPE_CHECKING:
    import torch

    from fafa.model.blip2 import Blip2FAFACPR
    from fafa.transforms import TransformPair

logger = logging.getLogger("fafa.trained")

MODEL_CONFIG = "model_config.yaml"
# What a file that lacks an entry means. Unknown entries are ignored: the published file has some.
_DEFAULTS: dict[str, Any] = {
    "fda_k": 6,
    "fda_alpha": 0.5,
    "fd_margin": 0.5,
    "transform": "squarepad",
    "target_ratio": 1.25,
    "backbone": "pretrain",
    "itcpr_root": "",
}
# Weights that decide features; the others are heads of losses.
_ENCODER = ("query_tokens", "visual_encoder.", "ln_vision.", "Qformer.bert.", "vision_proj.", "text_proj.")


@dataclass(frozen=True)
class TrainedRun:
    """A run directory whose files have been found.

    Attributes:
        directory: it.
        checkpoint: the weights.
        hyperparameters: `fda_k`, `fda_alpha`, `fd_margin`, `transform`, `target_ratio`, `backbone`, `itcpr_root`.
        backbone: built-in name or YAML file of the model.
    """

    directory: Path
    checkpoint: Path
    hyperparameters: Mapping[str, Any]
    backbone: str


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode on its device, with the transforms of its run."""

    model: "Blip2FAFACPR"
    device: "torch.device"
    transforms: "TransformPair"
    fingerprint: str
    """Of the encoders' weights and of the settings that decide the features."""


def add_run_flags(parser: Any) -> None:
    """The flags that name a trained model."""
    parser.add_argument("--exp-dir", required=True, help="run directory, with training_hyperparameters.json")
    parser.add_argument("--model-name", default=f"{BEST_BY_STEP}.pt", help="file of its saved_models/")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; without a GPU the CPU is used")
    parser.add_argument(
        "--backbone",
        help="addition: model to build instead of the recorded one: pretrain, pretrain_vitL, coco or a YAML file",
    )
    add_trust_flag(parser)


def add_loading_flags(parser: Any) -> None:
    """How images are loaded."""
    parser.add_argument("--batch-size", type=whole_number(1), default=256, help="images encoded at once")
    parser.add_argument("--num-workers", type=whole_number(0), default=4, help="processes that load images")


def read_run(flags: argparse.Namespace) -> TrainedRun:
    """Find the files of a run, before anything heavy is imported.

    Raises:
        InputError: a file is missing (the message says which ones are there) or damaged.
    """
    directory = Path(flags.exp_dir)
    if not directory.is_dir():
        raise InputError(f"--exp-dir {directory} does not exist: give a run directory of the training command")
    recorded = directory / HYPERPARAMETERS
    if not recorded.is_file():
        raise InputError(f"{recorded} does not exist: give a run directory, or put the published file there")
    checkpoint = directory / WEIGHTS / flags.model_name
    if not checkpoint.is_file():
        there = sorted(path.name for path in (directory / WEIGHTS).glob("*") if path.suffix in (".pt", ".safetensors"))
        remedy = f"choose one of {', '.join(there)} with --model-name" if there else "the folder holds no weights"
        raise CheckpointError(f"{checkpoint} does not exist: {remedy}")
    hyperparameters = read_hyperparameters(recorded)
    config = directory / MODEL_CONFIG
    backbone = flags.backbone or (str(config) if config.is_file() else hyperparameters["backbone"])
    return TrainedRun(directory, checkpoint, hyperparameters, backbone)


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The entries of `training_hyperparameters.json` that inference needs; absent ones have their defaults.

    Raises:
        InputError: the file is no JSON object, or an entry has an impossible value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object: copy or download it again")
    values = {name: default if content.get(name) is None else content[name] for name, default in _DEFAULTS.items()}
    for name, default in _DEFAULTS.items():
        value = values[name]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{path}: '{name}' cannot be {value!r}: correct the file")
    if values["transform"] not in TRANSFORMS:
        raise InputError(f"{path}: 'transform' must be one of {', '.join(TRANSFORMS)}, not {values['transform']!r}")
    if values["fda_k"] < 1 or values["target_ratio"] <= 0:
        raise InputError(f"{path}: 'fda_k' and 'target_ratio' must be positive: correct the file")
    return values


def open_trained(run: TrainedRun, device_name: str, *, trust: bool = False) -> TrainedModel:
    """Build the model of a run and load its weights.

    Start weights are fetched only if the checkpoint leaves the frozen ViT out.

    Args:
        run: of `read_run`.
        device_name: of `--device`; a GPU that is not there gives the CPU and a message.
        trust: read a checkpoint that could run code.

    Raises:
        InputError: the weights are damaged or of another model, or a setting does not fit them.
    """
    from fafa.model.settings import read_model_config
    from fafa.transforms import build_transforms
    from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file

    content = load_checkpoint_file(run.checkpoint, trust=trust, mmap=True)
    state, _ = find_state_dict(content, source=str(run.checkpoint))
    tokens = state.get("query_tokens")
    stored_tokens = tokens.shape[1] if tokens is not None and tokens.dim() == 3 else None
    config = read_model_config(run.backbone, num_query_token=stored_tokens)
    values = run.hyperparameters
    if values["fda_k"] > config["num_query_token"]:
        raise InputError(
            f"{run.directory / HYPERPARAMETERS} has fda_k {values['fda_k']}, but the model has only "
            f"{config['num_query_token']} query tokens: correct fda_k"
        )
    model = _loaded(config, state, run.checkpoint)

    from fafa.model import place

    device = _device(device_name)
    model = place(model, device).eval()
    model.fda_k, model.fda_alpha = values["fda_k"], values["fda_alpha"]
    model.dispersion_loss.margin = values["fd_margin"]
    encoder = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODER)}
    settings = {
        "transform": values["transform"],
        "target_ratio": values["target_ratio"] if values["transform"] == "targetpad" else None,
        "image_size": config["image_size"],
        "max_txt_len": config["max_txt_len"],
    }
    transforms = build_transforms(values["transform"], config["image_size"], values["target_ratio"])
    return TrainedModel(model, device, transforms, fingerprint(encoder, settings))


def _loaded(config: dict[str, Any], state: "Mapping[str, torch.Tensor]", source: Path) -> "Blip2FAFACPR":
    from fafa.model import Blip2FAFACPR
    from fafa.model.weights import StateDictMismatch, load_official_state_dict

    alone = {
        **config,
        "load_pretrained": False,
        "load_finetuned": False,
        "vit_weights": None,
        "qformer": {**config["qformer"], "init_from": None},
    }
    has_vit = any(name.startswith("visual_encoder.") for name in state)
    model = Blip2FAFACPR.from_config(alone if has_vit else config)
    try:
        result = load_official_state_dict(model, state)
    except StateDictMismatch as error:
        raise CheckpointError(
            f"{source} does not fit the model ({error}): name the backbone it was trained with by --backbone"
        ) from error
    missing = [name for name in result.missing_keys if has_vit or not name.startswith("visual_encoder.")]
    lost = [name for name in missing if name.startswith(_ENCODER)]
    if lost or (missing and len(missing) > len(state)):
        raise CheckpointError(
            f"{source} lacks {len(lost)} weights of the model, such as {(lost or missing)[0]}: it belongs to another model, "
            "name its backbone by --backbone"
        )
    for what, names in (("missing in", missing), ("unknown in", result.unexpected_keys)):
        if names:
            logger.warning("%d weights are %s %s, such as %s", len(names), what, source, names[0])
    return model


def _device(name: str) -> "torch.device":
    import torch

    from tbps_common.run.device import choose_device

    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        print("no GPU can be used: computing on the CPU")
        name = "cpu"
    return choose_device(name)
