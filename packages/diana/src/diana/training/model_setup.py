"""The model of a training run: configuration from file and flags, weights, what is frozen, and its size in words."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.errors import InputError

if TYPE_CHECKING:
    import torch

    from diana.model import DiaNAConfig, DiaNAModel

_BIG_GPU_BYTES = 79e9


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of `--force_image_size`; one number is a square."""
    sizes = args.force_image_size
    return (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def build_config(args: argparse.Namespace, source: str | Path, pad_token_id: int | None) -> "DiaNAConfig":
    """The configuration in `source`, overwritten by the flags."""
    from diana.model import DiaNAConfig

    config: Any = DiaNAConfig.from_pretrained(source)
    config.refiner_config.update(
        enable=args.enable_refiner,
        enable_refiner=args.enable_refiner,
        num_query=args.num_query,
        sim_type=args.sim_type,
        enable_sdm=args.enable_sdm,
    )
    config.enable_sdm = args.enable_sdm
    config.vision_config["drop_path_rate"] = args.drop_path_rate
    config.vision_config["drop_path_schedule"] = args.drop_path_schedule
    config.vision_config["image_size"] = list(image_size(args))
    config.force_image_size = list(image_size(args))
    # Read by the released code alone, which loads both backbones even to evaluate.
    for part, path in ((config.vision_config, args.vision_pretrained), (config.llama_config, args.llama_pretrained)):
        if path:
            part["pretrained"] = path
    if pad_token_id is not None:
        config.llama_config["pad_token_id"] = pad_token_id
    config.attn_implementation = args.attn_implementation
    return config


def build_model(args: argparse.Namespace, checkpoint: Path | None, pad_token_id: int | None) -> "DiaNAModel":
    """The model with float32 weights, as training starts or goes on.

    Args:
        args: flags of `parse_train_flags`.
        checkpoint: of this run, to go on from.
        pad_token_id: of the tokenizer.

    Raises:
        InputError: weights or configuration cannot be used.
    """
    import torch

    from diana.model import DiaNAModel

    source = checkpoint or args.pretrained
    config: Any = build_config(args, source or args.config_dir, pad_token_id)
    if source:
        model = DiaNAModel.from_pretrained(source, config=config, dtype=torch.float32)
    elif args.init_from_scratch:
        model = DiaNAModel(config)
    else:
        model = DiaNAModel.from_backbones(config, args.vision_pretrained, args.llama_pretrained)
    freeze(model, args)
    adapters = config.use_llama_lora
    if args.use_llama_lora and not (checkpoint and adapters == args.use_llama_lora):
        model.add_llama_lora(args.use_llama_lora)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("nothing is left to train: leave --freeze_model out, or unfreeze or add something")
    return model


def freeze(model: "torch.nn.Module", args: argparse.Namespace) -> None:
    """Apply the freezing flags; frozen parts stay in train mode, as released (drop path goes on)."""
    parts: Any = model
    if args.freeze_model:
        model.requires_grad_(False)
    if args.freeze_vision_model:
        parts.vision_model.requires_grad_(False)
    if args.freeze_llama:
        parts.llama.requires_grad_(False)
    if args.unfreeze_llama_projection:
        parts.text_projection.requires_grad_(True)


def use_checkpointing(choice: str, device: "torch.device") -> bool:
    """Whether activations are recomputed; `auto`: on GPUs of less than 80 GB."""
    import torch

    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _BIG_GPU_BYTES


def size_sentences(model: "torch.nn.Module") -> list[str]:
    """The four lines about the number of parameters."""
    parts: Any = model

    def count(parameters: Any) -> str:
        return human(sum(parameter.numel() for parameter in parameters))

    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [
        f"number of total params: {count(model.parameters())}",
        f"number of params with requires_grad: {count(trained)}",
        f"number of visual params: {count(parts.vision_model.parameters())}",
        f"number of text params: {count(parts.llama.parameters())}",
    ]


def human(number: int) -> str:
    """`1.34 B`, `86.89 M`, `12.30 K`; below 1000 the number itself."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
