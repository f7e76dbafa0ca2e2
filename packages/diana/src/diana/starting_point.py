"""What a training starts or goes on with: checkpoint, configuration, weights, what is frozen, and the size in words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from diana.checkpoints import ARGUMENTS_NAME, check_state, checkpoints_to_resume
from diana.model.config import DiaNAConfig
from diana.model.diana import DiaNAModel
from diana.model.folders import has_sound_weights
from diana.options import TrainOptions
from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import load_checkpoint_file

_BIG_GPU_BYTES = 79e9


def checkpoint_to_go_on_from(options: TrainOptions, args: TrainingArguments) -> tuple[Path | None, list[Path]]:
    """The checkpoint that a run goes on from, if any, and the damaged ones that are passed over, each with a warning.

    Raises:
        CheckpointError: no checkpoint that is asked for or found can be used.
        InputError: as `checkpoints_to_resume`; or a flag has changed that the state of the optimizer would override.
    """
    requested, output_dir = str(args.resume_from_checkpoint or ""), Path(str(args.output_dir))
    if not requested and not args.do_train:
        return None, []
    damaged: dict[Path, CheckpointError] = {}
    for folder in checkpoints_to_resume(requested, output_dir, overwrite=options.overwrite_output_dir):
        try:
            _require_sound(folder)
        except CheckpointError as error:
            damaged[folder] = error
            continue
        for error in damaged.values():
            print(f"warning: {error}; resuming from {folder}")
        _require_same_optimizer(folder, args)
        return folder, list(damaged)
    for error in damaged.values():
        raise error
    return None, []


def _require_same_optimizer(folder: Path, args: TrainingArguments) -> None:
    """Refuse flags that a resumed run cannot follow: the optimizer's state brings its own rates back."""
    try:
        before = json.loads((folder.parent / ARGUMENTS_NAME).read_text(encoding="utf-8"))["trainer"]
    except (OSError, ValueError, KeyError):
        return  # not written by this program, or by a version that did not note them
    for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        now = getattr(args, name)
        if before.get(name, now) != now:
            raise InputError(
                f"--{name} was {before[name]} when the run of {folder} began, and is {now} now, but a resumed run keeps the "
                "optimizer's settings: use the same, or start a new run from its weights with --pretrained"
            )


def _require_sound(folder: Path) -> None:
    """Look at every file of a checkpoint that training goes on from: the trainer would answer damage with a traceback."""
    check_state(folder)
    if not has_sound_weights(folder):
        raise CheckpointError(f"the weights in {folder} are missing or damaged: resume from another checkpoint")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if (folder / name).is_file():
            load_checkpoint_file(folder / name, mmap=True)
    if not (folder / "optimizer.pt").is_file() and not list(folder.glob("global_step*")):
        raise CheckpointError(f"{folder} holds no optimizer state: start from its weights with --pretrained")


def build_config(options: TrainOptions, source: str | Path, pad_token_id: int | None) -> DiaNAConfig:
    """The configuration in `source`, overwritten by the flags."""
    config: Any = DiaNAConfig.from_pretrained(source)
    config.refiner_config.update(
        enable=options.enable_refiner,
        enable_refiner=options.enable_refiner,
        num_query=options.num_query,
        sim_type=options.sim_type,
        enable_sdm=options.enable_sdm,
    )
    config.enable_sdm = options.enable_sdm
    config.vision_config["drop_path_rate"] = options.drop_path_rate
    config.vision_config["drop_path_schedule"] = options.drop_path_schedule
    config.vision_config["image_size"] = list(options.image_size)
    config.force_image_size = list(options.image_size)
    # Read by the released code alone, which loads both backbones even to evaluate.
    for part, path in (
        (config.vision_config, options.vision_pretrained),
        (config.llama_config, options.llama_pretrained),
    ):
        if path:
            part["pretrained"] = path
    if pad_token_id is not None:
        config.llama_config["pad_token_id"] = pad_token_id
    config.attn_implementation = options.attn_implementation
    return config


def build_model(
    options: TrainOptions, checkpoint: Path | None, pad_token_id: int | None, *, scalars: bool = True
) -> DiaNAModel:
    """The model with float32 weights, as training starts or goes on.

    Args:
        options: flags of `parse_train_flags`.
        checkpoint: of this run, to go on from.
        pad_token_id: of the tokenizer.
        scalars: False: the temperature is a vector of one number, because DeepSpeed 0.19 sends parameters as bytes, and a
            scalar cannot be seen as bytes.

    Raises:
        InputError: weights or configuration cannot be used.
    """
    source = checkpoint or options.pretrained
    config: Any = build_config(options, source or options.config_dir, pad_token_id)
    if source:
        model = DiaNAModel.from_pretrained(source, config=config, dtype=torch.float32)
    elif options.init_from_scratch:
        model = DiaNAModel(config)
    else:
        assert options.vision_pretrained and options.llama_pretrained  # diana.preflight
        model = DiaNAModel.from_backbones(config, options.vision_pretrained, options.llama_pretrained)
    if not scalars:
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    freeze(model, options)
    adapters = config.use_llama_lora
    if options.use_llama_lora and not (checkpoint and adapters == options.use_llama_lora):
        model.add_llama_lora(options.use_llama_lora)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("nothing is left to train: leave --freeze_model out, or unfreeze or add a part")
    return model


def freeze(model: DiaNAModel, options: TrainOptions) -> None:
    """Apply the freezing flags; frozen parts stay in train mode, as released (drop path goes on)."""
    if options.freeze_model:
        model.requires_grad_(False)
    if options.freeze_vision_model:
        model.vision_model.requires_grad_(False)
    if options.freeze_llama:
        model.llama.requires_grad_(False)
    if options.unfreeze_llama_projection:
        model.text_projection.requires_grad_(True)


def use_checkpointing(choice: str, device: torch.device) -> bool:
    """Whether activations are recomputed; `auto`: on GPUs of less than 80 GB."""
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _BIG_GPU_BYTES


def size_sentences(model: DiaNAModel) -> list[str]:
    """The four lines about the number of parameters."""

    def count(parameters: Iterable[nn.Parameter]) -> str:
        return human(sum(parameter.numel() for parameter in parameters))

    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [
        f"number of total params: {count(model.parameters())}",
        f"number of params with requires_grad: {count(trained)}",
        f"number of visual params: {count(model.vision_model.parameters())}",
        f"number of text params: {count(model.llama.parameters())}",
    ]


def human(number: int) -> str:
    """`1.34 B`, `86.89 M`, `12.30 K`; below 1000 the number itself."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
