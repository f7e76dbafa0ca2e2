"""What is trained, in which number format, with which learning rate."""

import argparse
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from dp_gen.model.diverse_person import DiversePersonModel
from tbps_common.errors import InputError


def set_trainable(
    model: DiversePersonModel, args: argparse.Namespace, weight_dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze everything, in `weight_dtype`, but what is trained, which is float32 and keeps its numbers.

    Trained are the U-Net, the controller (unless `--activate_controller`, sic, freezes it), and on request the text
    encoder and the image encoder or its last layers.

    Returns:
        Names of the trainable parameters in the order of the optimizer.

    Raises:
        InputError: more layers are to be trained than the image encoder has.
    """
    trained: list[nn.Module] = [model.unet]
    if not args.activate_controller and args.text_image_linking == "control":
        trained.append(model.controller)
    if args.train_text_encoder:
        trained.append(model.text_encoder)
    if args.train_image_encoder:
        count, layers = args.image_encoder_trainable_layers, model.image_encoder.vision_model.encoder.layers
        if count > len(layers):
            raise InputError(
                f"--image_encoder_trainable_layers {count} is more than the {len(layers)} layers of the image encoder: "
                "lower it; 0 trains all of it"
            )
        trained += list(layers[len(layers) - count :]) if count else [model.image_encoder]
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)
    inside = {id(module) for part in trained for module in part.modules()}
    for module in model.modules():
        dtype = torch.float32 if id(module) in inside else weight_dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    unet, others = _trainable(model)
    return [*unet, *others]


def _trainable(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters of the U-Net, and all others, by name."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unet = {name: parameter for name, parameter in named.items() if name.startswith("unet.")}
    return unet, {name: parameter for name, parameter in named.items() if "unet" not in name}


def build_optimizer(model: DiversePersonModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with two groups: the U-Net at `lr * unet_lr_scale`, everything else at `lr` (maybe an empty group).

    Call it after `set_trainable`, with the model on its device. Weight decay also applies to biases and norms.
    """
    unet, others = (list(group.values()) for group in _trainable(model))
    on_gpu = all(parameter.device.type == "cuda" for parameter in (*unet, *others))
    # The optimizer's own default learning rate stays torch's 1e-3: the polynomial schedule refers to it, as released.
    return torch.optim.AdamW(
        [{"params": unet, "lr": args.lr * args.unet_lr_scale}, {"params": others, "lr": args.lr}],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True if on_gpu else None,
    )


def build_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> Any:
    """diffusers' schedule of `--lr_scheduler`.

    Warm-up and length are multiplied by the accumulation, as released, although a step is taken per update. `constant`
    has no warm-up.

    Raises:
        ValueError: the schedule needs a length, and `args.max_train_steps` is None.
    """
    accumulation = args.gradient_accumulation_steps
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accumulation,
        num_training_steps=None if args.max_train_steps is None else args.max_train_steps * accumulation,
    )
