"""What a LoRA is trained with: the denoising objective of each family of text-to-image models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbps_common.errors import InputError

# Projections of the attention, in UNets and transformers alike; the second row is Flux's text stream.
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)


class Denoising(ABC):
    """A pipeline's frozen parts, and the loss of its denoiser.

    Attributes:
        pipeline: of diffusers.
        denoiser: its UNet or transformer.
        part: `unet` or `transformer`: what LoRA files call it.
        latent_channels: of the auto-encoder.
    """

    part: str

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.denoiser: Any = getattr(pipeline, self.part)
        self.latent_channels: int = pipeline.vae.config.latent_channels

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """`(C, h, w)` of the latents of a picture."""
        scale = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return self.latent_channels, height // scale, width // scale

    @torch.no_grad()
    def latents(self, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
        """Latents `[B, C, h, w]`, drawn from the auto-encoder's posterior with the noise given.

        Args:
            pixels: `[B, 3, H, W]` in [-1, 1].
            posterior_noise: `[B, C, h, w]`, standard normal.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        drawn = posterior.mean + posterior.std * posterior_noise.to(vae.dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (drawn - shift) * vae.config.scaling_factor

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Any:
        """What the denoiser reads of the captions."""

    @abstractmethod
    def loss(self, latents: Tensor, texts: Any, noise: Tensor, uniform: Tensor) -> Tensor:
        """Mean squared error of the denoiser's prediction, a scalar.

        Args:
            latents: `[B, C, h, w]`.
            texts: of `encode`.
            noise: `[B, C, h, w]`, standard normal.
            uniform: `[B]` in [0, 1), decides the time.
        """


class NoisePrediction(Denoising):
    """Stable Diffusion 1 and 2: a UNet that predicts the noise (or v) of discrete times."""

    part = "unet"

    def __init__(self, pipeline: Any):
        from diffusers import DDPMScheduler

        super().__init__(pipeline)
        self.schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        embeddings, _ = self.pipeline.encode_prompt(
            list(captions), device=self.denoiser.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeddings

    def loss(self, latents: Tensor, texts: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        times = (uniform * self.schedule.config.num_train_timesteps).long()
        noisy = self.schedule.add_noise(latents, noise, times)
        predicted = self.denoiser(noisy, times, encoder_hidden_states=texts).sample
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, times)
        else:
            target = noise
        return torch.nn.functional.mse_loss(predicted.float(), target.float())


class FlowMatching(Denoising):
    """Flux: a transformer that predicts the velocity from picture to noise along straight lines.

    x_t = (1 - t) x + t n, and the target is n - x. Times are logistic-normal (Esser et al. 2024, section 3.1).
    """

    part = "transformer"
    guidance = 1.0  # FLUX.1-dev is distilled: it reads a guidance scale, which training leaves at 1

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return self.pipeline.encode_prompt(
            prompt=list(captions), prompt_2=None, device=self.denoiser.device, max_sequence_length=512
        )

    def loss(self, latents: Tensor, texts: tuple[Tensor, Tensor, Tensor], noise: Tensor, uniform: Tensor) -> Tensor:
        prompt, pooled, text_ids = texts
        times = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid().float()
        mix = times.view(-1, 1, 1, 1)
        noisy = ((1 - mix) * latents + mix * noise).to(latents.dtype)
        _, _, height, width = latents.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full_like(times, self.guidance)
        predicted = self.denoiser(
            hidden_states=packed(noisy),
            timestep=times,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=text_ids,
            img_ids=picture_ids(height // 2, width // 2).to(latents.device, latents.dtype),
            return_dict=False,
        )[0]
        return torch.nn.functional.mse_loss(predicted.float(), packed(noise - latents).float())


def packed(latents: Tensor) -> Tensor:
    """`[B, C, h, w]` -> `[B, h/2 * w/2, 4 C]`: Flux reads patches of 2 x 2."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, h/2, w/2, 2, 2]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def picture_ids(rows: int, columns: int) -> Tensor:
    """`[rows * columns, 3]`: 0, row and column of each patch."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def denoising_of(pipeline: Any) -> Denoising:
    """The objective for a pipeline.

    Raises:
        InputError: the family has another objective than the two above.
    """
    kind = type(pipeline).__name__
    if kind == "StableDiffusionPipeline" and pipeline.scheduler.config.prediction_type in ("epsilon", "v_prediction"):
        return NoisePrediction(pipeline)
    if kind == "FluxPipeline":
        return FlowMatching(pipeline)
    raise InputError(
        f"--model is a {kind}: LoRAs are trained for Stable Diffusion 1 and 2 and for Flux; for another model train one "
        "with its own tools and give it to fafa-syncpr images --lora"
    )
