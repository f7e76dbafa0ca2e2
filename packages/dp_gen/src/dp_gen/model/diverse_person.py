"""The Diverse-Person model: Stable Diffusion 1.5, a CLIP image encoder, and the controller between them."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_gen.losses import attribute_localization_loss, attribute_region, masked_mse
from dp_gen.model.attention import AttentionCapture, attention_grids, reference_attention
from dp_gen.model.controller import DiversePersonController, matching_places
from dp_gen.model.parts import load_image_encoder, load_text_encoder, load_unet, load_vae
from dp_gen.model.weights import load_checkpoint
from tbps_common.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Batch = Mapping[str, Tensor]
"""What `dp_gen.collate_fn` returns: pix_v, input_ids, img_token_mask, img_token_idx, img_token_idx_mask, attribute_v,
attribute_seg_maps, reference_attribute_num, img_ids, reference_places, token_places."""


class DiversePersonModel(nn.Module):
    """Everything that is trained or needed for training; one forward pass gives the losses.

    B samples, N attribute slots, L text positions, D text width, R resolution, h = w = R/8.

    Args:
        text_encoder: transformers' `CLIPTextModel`.
        image_encoder: transformers' `CLIPVisionModelWithProjection`; its projection is as wide as the text.
        vae: diffusers' `AutoencoderKL`.
        unet: diffusers' `UNet2DConditionModel`.
        args: flags of `dp_gen.parse_args`.

    Raises:
        InputError: the parts do not fit each other.
    """

    def __init__(self, text_encoder: Any, image_encoder: Any, vae: Any, unet: Any, args: argparse.Namespace):
        super().__init__()
        width = text_encoder.config.hidden_size
        for what, other in (
            ("projection of the image encoder (--image_encoder_hf)", image_encoder.config.projection_dim),
            ("cross-attention of the U-Net", unet.config.cross_attention_dim),
        ):
            if other != width:
                raise InputError(
                    f"the text encoder is {width} wide and the {what} {other}: the two must be equal, as in Stable "
                    "Diffusion 1.5 with CLIP ViT-L/14 (768)"
                )
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.vae = vae
        self.unet = unet
        self.controller = DiversePersonController(width)
        self.mask_loss, self.mask_prob = args.mask_loss, args.mask_loss_prob
        self.loc_weight, self.loc_norm = args.attribute_loc_weight, args.attribute_loc_norm
        self.capture = AttentionCapture(unet, args.loc_layers) if args.attribute_loc else None

    @classmethod
    def from_pretrained(cls, args: argparse.Namespace) -> "DiversePersonModel":
        """The pretrained parts that `args` name, with a new controller (and then `args.load_model`, if given).

        Raises:
            InputError: a part cannot be found, read or used.
        """
        model = cls(load_text_encoder(args), load_image_encoder(args), load_vae(args), load_unet(args), args)
        if args.load_model:
            load_checkpoint(model, args.load_model)
        return model

    def encode_image(self, attribute_v: Tensor) -> Tensor:
        """Features of reference images, not normalised.

        Args:
            attribute_v: [B, N, 3, R, R] in [0, 1].

        Returns:
            [B, N, 1, D].
        """
        batch, slots = attribute_v.shape[:2]
        return self._image_features(attribute_v.flatten(0, 1)).view(batch, slots, 1, -1)

    def _image_features(self, images: Tensor) -> Tensor:
        """[M, 3, R, R] in [0, 1] -> [M, D]"""
        size = self.image_encoder.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        # Filled on the device: a tensor made of a list would be copied there, and the copy waited for.
        mean, std = (
            torch.stack([images.new_full((1, 1), value) for value in values]) for values in (CLIP_MEAN, CLIP_STD)
        )
        pixels = ((images - mean) / std).to(self.image_encoder.dtype)
        return self.image_encoder(pixel_values=pixels).image_embeds

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Last hidden state after the final LayerNorm: [B, L] -> [B, L, D]. Only the causal mask, none for padding."""
        return self.text_encoder(input_ids=input_ids).last_hidden_state

    def encode_condition(self, batch: Batch) -> Tensor:
        """What the U-Net attends to: text features, with the references fused in. [B, L, D].

        Needs `input_ids`, `img_token_mask`, `attribute_v` and `reference_attribute_num` of the batch; `reference_places` and
        `token_places` are found (`matching_places`) where they are absent. Only valid slots are encoded; the result is that
        of encoding all.
        """
        references = batch["attribute_v"]
        if "token_places" in batch:
            slots, tokens = batch["reference_places"], batch["token_places"]
        else:
            mask, counts = batch["img_token_mask"], batch["reference_attribute_num"]
            slots, tokens = matching_places(mask, counts, references.shape[1])
        images = references.flatten(0, 1)
        # A batch without any reference encodes one padding slot, whose feature is not used: all parameters then have
        # (zero) gradients, as distributed training needs.
        features = self._image_features(images[slots] if len(slots) else images[:1])[: len(slots)]
        return self.controller.fuse_at(self.encode_text(batch["input_ids"]), tokens, features)

    def encode_latents(self, pix_v: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of the VAE's posterior, times its scaling factor.

        Args:
            pix_v: [B, 3, R, R] in [-1, 1].
            noise: [B, 4, h, w], standard normal; None draws it.
        """
        posterior = self.vae.encode(pix_v.to(self.vae.dtype)).latent_dist
        if noise is None:
            noise = _normal_like(posterior.mean)
        # autocast computes the deviation's exponential in float32 on GPUs; the latents keep the VAE's type.
        return (posterior.mean + posterior.std.to(posterior.mean.dtype) * noise) * self.vae.config.scaling_factor

    def forward(self, batch: Batch, noise_scheduler: Any, draws: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The losses of one batch (spec section 6).

        Args:
            batch: see `Batch`.
            noise_scheduler: diffusers' `DDPMScheduler`.
            draws: given random numbers instead of drawn ones: `posterior_noise` and `noise` [B, 4, h, w], `timesteps`
                [B], `mask_uniform` (a number).

        Returns:
            `loss` and `denoise_loss`, and `localization_loss` if the attention is supervised: scalars.
        """
        with reference_attention(batch["pix_v"].device):
            return self._losses(batch, noise_scheduler, draws or {})

    def _losses(self, batch: Batch, noise_scheduler: Any, draws: Mapping[str, Any]) -> dict[str, Tensor]:
        latents = self.encode_latents(batch["pix_v"], draws.get("posterior_noise"))
        noise = draws.get("noise")
        if noise is None:
            noise = _normal_like(latents)
        timesteps = draws.get("timesteps")
        if timesteps is None:
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
        masked = False
        if self.mask_loss:
            uniform = draws.get("mask_uniform")
            masked = float(torch.rand(()) if uniform is None else uniform) < self.mask_prob
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        condition = self.encode_condition(batch)
        target = _target(noise_scheduler, latents, noise, timesteps)
        height, width = latents.shape[-2:]
        region = attribute_region(batch["attribute_seg_maps"], (height, width)) if masked else None
        if self.capture is None:
            prediction = self.unet(noisy, timesteps, condition).sample
            loss = masked_mse(prediction, target, region)
            return {"loss": loss, "denoise_loss": loss}
        with self.capture.recording() as attention:
            prediction = self.unet(noisy, timesteps, condition).sample
        denoise_loss = masked_mse(prediction, target, region)
        localization_loss = attribute_localization_loss(
            attention,
            batch["attribute_seg_maps"],
            batch["img_token_idx"],
            batch["img_token_idx_mask"],
            self.loc_norm,
            attention_grids(self.unet, list(attention), height, width),
        )
        return {
            "loss": denoise_loss + self.loc_weight * localization_loss,
            "denoise_loss": denoise_loss,
            "localization_loss": localization_loss,
        }


def _normal_like(like: Tensor) -> Tensor:
    # Not randn_like: a channels-last tensor, as convolutions may return, would be filled in another order.
    return torch.randn(like.shape, device=like.device, dtype=like.dtype)


def _target(noise_scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise InputError(f"the model's scheduler predicts {kind!r}; only 'epsilon' and 'v_prediction' can be trained")
