"""The denoising loop: classifier-free guidance, references entering after some steps, and edits within a region.

B images, h x w latents, L text positions, D text width. Latents and the scheduler's arithmetic are float32 whatever the
U-Net computes in: the steps are many, and each adds little. Timesteps stay on the CPU, where schedulers look at them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Keep = Callable[[Tensor, Tensor | None], Tensor]
"""Called after every step with the latents and the timestep they now belong to (None after the last step)."""


@torch.no_grad()
def denoise(
    model: Any,
    scheduler: Any,
    latents: Tensor,
    cond: Tensor,
    text_cond: Tensor,
    null_cond: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    start_merge_step: int,
) -> Tensor:
    """From noise to latents of images.

    Call number i of the U-Net (PNDM makes one more than there are steps) sees the plain caption while
    i <= `start_merge_step`, and the references from then on; -1 shows them from the first call.

    Args:
        model: a `DiversePersonModel`; its `unet` is used.
        scheduler: a diffusers scheduler; its timesteps are set here.
        latents: [B, 4, h, w], float32, times the scheduler's initial noise sigma already.
        cond: [B, L, D] with the references.
        text_cond: [B, L, D] of the plain caption.
        null_cond: [B, L, D] of the empty (or negative) caption.
        num_inference_steps: of the scheduler.
        guidance_scale: g in null + g * (cond - null).
        start_merge_step: see above.

    Returns:
        [B, 4, h, w], float32.
    """
    scheduler.set_timesteps(num_inference_steps)
    conditions = (cond, text_cond, null_cond)
    return run_steps(model.unet, scheduler, latents, scheduler.timesteps, conditions, guidance_scale, start_merge_step)


def run_steps(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    timesteps: Tensor,
    conditions: tuple[Tensor, Tensor, Tensor],
    guidance_scale: float,
    start_merge_step: int,
    *,
    first_call: int = 0,
    keep: Keep | None = None,
) -> Tensor:
    """The loop of `denoise` over given timesteps (on the CPU); `first_call` is the number of the first of them."""
    cond, text_cond, null_cond = conditions
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    of_unet = timesteps.to(latents.device, non_blocking=True)
    for place, timestep in enumerate(timesteps):
        chosen = text_cond if first_call + place <= start_merge_step else cond
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        prediction = unet(doubled.to(chosen.dtype), of_unet[place], torch.cat([null_cond, chosen])).sample
        without, with_caption = prediction.to(latents.dtype).chunk(2)
        guided = without + guidance_scale * (with_caption - without)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        if keep is not None:
            following = timesteps[place + 1] if place + 1 < len(timesteps) else None
            latents = keep(latents, following)
    return latents


@torch.no_grad()
def edit(
    model: Any,
    scheduler: Any,
    original: Tensor,
    region: Tensor,
    noise: Tensor,
    cond: Tensor,
    text_cond: Tensor,
    null_cond: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    start_merge_step: int,
    strength: float,
) -> Tensor:
    """Latents of images that differ from the original within a region only (blended latent diffusion).

    The last round(strength * steps) steps are made. After each of them the latents outside the region are replaced by
    the original's, with as much of the same noise as belongs to that step.

    Args:
        model: a `DiversePersonModel`.
        scheduler: a diffusers scheduler.
        original: [B, 4, h, w], latents of the images to edit.
        region: [B, 1, h, w], 1 where the image may change.
        noise: [B, 4, h, w], standard normal.
        cond: as for `denoise`.
        text_cond: as for `denoise`.
        null_cond: as for `denoise`.
        num_inference_steps: of the scheduler.
        guidance_scale: as for `denoise`.
        start_merge_step: as for `denoise`; calls are counted as if all steps were made.
        strength: above 0, at most 1; 1 begins with pure noise in the region.
    """
    scheduler.set_timesteps(num_inference_steps)
    steps = max(1, round(strength * num_inference_steps))
    timesteps, first_call = last_timesteps(scheduler, steps)

    def noisy(timestep: Tensor | None) -> Tensor:
        if timestep is None:
            return original
        of_images = timestep.reshape(1).expand(len(original))
        return scheduler.add_noise(original, noise, of_images.to(original.device, non_blocking=True))

    def keep(latents: Tensor, following: Tensor | None) -> Tensor:
        return region * latents + (1 - region) * noisy(following)

    latents = noisy(timesteps[0])
    if strength >= 1:
        latents = region * noise * scheduler.init_noise_sigma + (1 - region) * latents
    return run_steps(
        model.unet,
        scheduler,
        latents,
        timesteps,
        (cond, text_cond, null_cond),
        guidance_scale,
        start_merge_step,
        first_call=first_call,
        keep=keep,
    )


def last_timesteps(scheduler: Any, steps: int) -> tuple[Tensor, int]:
    """The timesteps of the last `steps` steps, and how many calls of the whole loop come before them.

    A scheduler that evaluates its second timestep twice to start up (PNDM) does so from wherever it starts.
    """
    every: Sequence[Any] = list(scheduler.timesteps)
    distinct = [timestep for place, timestep in enumerate(every) if place == 0 or timestep != every[place - 1]]
    if len(distinct) <= steps:
        return scheduler.timesteps, 0
    tail = distinct[len(distinct) - steps :]
    if len(distinct) < len(every) and len(tail) > 1:
        tail.insert(1, tail[1])
    elif hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(every) - steps)
    return torch.stack(tail), len(every) - len(tail)


@torch.no_grad()
def decode_latents(model: Any, latents: Tensor) -> Tensor:
    """Images of latents: [B, 4, h, w] -> float32 [B, 3, 8h, 8w] in [0, 1]."""
    vae = model.vae
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
