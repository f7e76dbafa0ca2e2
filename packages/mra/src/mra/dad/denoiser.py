"""The network that is fine-tuned: a frozen Stable Diffusion with a trainable ControlNet, or with low-rank matrices.

ControlNet (Zhang, Rao and Agrawala, 2023): a copy of the UNet's encoder and middle block, whose outputs reach the frozen
decoder through convolutions that begin at zero. Its condition is a plain white picture here, so that what it learns is
the look of the data set and nothing about single pictures (paper, section on DaD).
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tbps_common.errors import InputError
from tbps_common.pipeline.models import load_model, quiet_libraries

CONTROLNET, LORA = "controlnet", "lora"
_CONDITION_CHANNELS = (16, 32, 96, 256)
_LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Denoiser(nn.Module):
    """Predicts the noise of latent pictures. Only the parameters to be trained require gradients.

    Args:
        unet: frozen, but for its low-rank matrices if it has any.
        controlnet: trained, or None.
        condition_size: height and width of the white picture.
    """

    def __init__(self, unet: Any, controlnet: Any, condition_size: tuple[int, int]):
        super().__init__()
        self.unet, self.controlnet, self.condition_size = unet, controlnet, condition_size

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """`[B, C, h, w]` noisy latents, `[B]` time steps, `[B, T, D]` text states -> `[B, C, h, w]` prediction."""
        if self.controlnet is None:
            return self.unet(noisy, timesteps, encoder_hidden_states=text).sample
        white = noisy.new_ones((1, 3, *self.condition_size)).expand(len(noisy), -1, -1, -1)
        down, middle = self.controlnet(
            noisy, timesteps, encoder_hidden_states=text, controlnet_cond=white, return_dict=False
        )
        return self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters to be trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


@dataclass
class Networks:
    """All parts of a training step.

    Attributes:
        denoiser: what is trained.
        vae: picture to latent picture; frozen.
        text_encoder: frozen.
        tokenizer: its tokenizer.
        schedule: the noise schedule of the training.
        latent: shape of a latent picture.
    """

    denoiser: Denoiser
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: Any
    latent: tuple[int, int, int]

    @torch.no_grad()
    def latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """`[B, 3, H, W]` pictures in -1..1 and standard normal noise -> a sample of their latent pictures, scaled."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return (posterior.mean + posterior.std * noise).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        """`[B, T]` token ids -> `[B, T, D]`."""
        return self.text_encoder(ids)[0]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is to predict: the noise, or the velocity for a model that was trained so."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise


def build_networks(
    name: str,
    method: str,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    lora_rank: int = 16,
    gradient_checkpointing: bool = False,
) -> Networks:
    """Load a Stable Diffusion and prepare what is trained.

    Args:
        name: hub id or folder.
        method: `controlnet` or `lora`.
        size: height and width of the pictures.
        device: where to compute.
        dtype: of the frozen parts; what is trained is float32.
        lora_rank: of the low-rank matrices.
        gradient_checkpointing: compute activations twice instead of keeping them.

    Raises:
        InputError: the model cannot be loaded, is another kind of model, or does not take pictures of this size.
    """
    import diffusers
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    loader = diffusers.DiffusionPipeline.from_pretrained
    pipeline: Any = load_model("--model", name, loader, dtype=dtype, use_safetensors=True)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise InputError(
            f"--model {name} is a {type(pipeline).__name__}: mra-dad finetune knows Stable Diffusion 1.x and 2.x "
            "(mra-dad generate takes any text-to-image model, with a LoRA of other tools)"
        )
    unet, vae = pipeline.unet, pipeline.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    step = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    if size[0] % step or size[1] % step:
        raise InputError(f"--height {size[0]} and --width {size[1]} must be multiples of {step} for --model {name}")
    for part in (unet, vae, pipeline.text_encoder):
        part.requires_grad_(False)
    controlnet = None
    if method == CONTROLNET:
        # The condition must shrink to the latent's size: one halving per entry after the first.
        channels = _CONDITION_CHANNELS[: round(math.log2(factor)) + 1]
        controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels).float()
        controlnet.train()
    else:
        from peft import LoraConfig  # an extra that only this method needs

        settings = LoraConfig(
            r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian", target_modules=_LORA_TARGETS
        )
        unet.add_adapter(settings)
    if gradient_checkpointing:
        for part in (unet, controlnet):
            if part is not None:
                part.enable_gradient_checkpointing()
    denoiser = Denoiser(unet, controlnet, size)
    for parameter in denoiser.trained().values():
        parameter.data = parameter.data.float()
    denoiser.to(device)
    return Networks(
        denoiser,
        vae.to(device),
        pipeline.text_encoder.to(device),
        pipeline.tokenizer,
        DDPMScheduler.from_config(pipeline.scheduler.config),
        (unet.config.in_channels, size[0] // factor, size[1] // factor),
    )


def save_weights(denoiser: Denoiser, folder: Path) -> None:
    """Write what was trained in diffusers' layout; the folder is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    try:
        with quiet_libraries():
            if denoiser.controlnet is not None:
                denoiser.controlnet.save_pretrained(temporary)
            else:
                from diffusers import StableDiffusionPipeline
                from diffusers.utils import convert_state_dict_to_diffusers
                from peft import get_peft_model_state_dict

                layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser.unet))
                StableDiffusionPipeline.save_lora_weights(temporary, unet_lora_layers=layers)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
