"""The tiny diffusion model and captioner of `mra-dad-make-tiny --steps`, trained from nothing on the pictures of a data set.

They stand for Stable Diffusion and BLIP-2, which are pre-trained on other pictures: `mra-dad finetune` then aligns the
first.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mra.dad.finetune import Pairs
from mra.dad.options import CAPTION_PROMPT
from tbps_common.datasets import ProcessedTrain
from tbps_common.images import read_image
from tbps_common.pipeline.models import quiet_libraries
from tbps_common.run.batches import EpochBatches, SeededItems
from tbps_common.run.randomness import seed_everything
from tbps_world.tiny.vae import start_as_mean_colours

BATCH_SIZE = 16
_AUTOENCODER_SHARE = 0.35
_KL_WEIGHT = 1e-5
_EMPTY_PROMPTS = 0.1


def train_diffusion(folder: Path, data: ProcessedTrain, size: tuple[int, int], steps: int, seed: int) -> None:
    """Train the model in `folder`, first its VAE and then UNet and text encoder, and write it back.

    Args:
        folder: in diffusers' layout.
        data: pictures and captions.
        size: height and width.
        steps: of both together.
        seed: of order and noise.

    Raises:
        InputError: the data do not fill a batch.
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    with quiet_libraries():
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    seed_everything(seed)
    vae, unet, text = pipeline.vae, pipeline.unet, pipeline.text_encoder
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    latent = (unet.config.in_channels, size[0] // factor, size[1] // factor)
    pairs = Pairs(data, pipeline.tokenizer, size, latent, schedule.config.num_train_timesteps, _EMPTY_PROMPTS)
    batches = EpochBatches(len(pairs), BATCH_SIZE, seed=seed)
    loader = DataLoader(SeededItems(pairs), batch_sampler=batches)

    first = max(1, round(steps * _AUTOENCODER_SHARE))

    def reconstruct(batch: dict[str, Tensor]) -> Tensor:
        posterior = vae.encode(batch["pixels"]).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * batch["encoding_noise"]).sample
        return F.l1_loss(decoded, batch["pixels"]) + _KL_WEIGHT * posterior.kl().mean()

    start_as_mean_colours(vae)
    _train([vae], reconstruct, batches, loader, first, rate=3e-3)
    _scale_latents(vae, loader)

    def denoise(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            posterior = vae.encode(batch["pixels"]).latent_dist
            latents = (posterior.mean + posterior.std * batch["encoding_noise"]) * vae.config.scaling_factor
        noisy = schedule.add_noise(latents, batch["noise"], batch["timestep"])
        predicted = unet(noisy, batch["timestep"], encoder_hidden_states=text(batch["ids"])[0]).sample
        return F.mse_loss(predicted, batch["noise"])

    _train([unet, text], denoise, batches, loader, steps - first, rate=2e-3)
    with quiet_libraries():
        pipeline.save_pretrained(folder)


def train_captioner(folder: Path, data: ProcessedTrain, steps: int, seed: int) -> None:
    """Train the BLIP-2 in `folder` to say the captions, and write it back.

    Args:
        folder: in transformers' layout.
        data: pictures and captions.
        steps: optimizer steps.
        seed: of the order.

    Raises:
        InputError: the data do not fill a batch.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with quiet_libraries():
        processor: Any = AutoProcessor.from_pretrained(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    seed_everything(seed)
    batches = EpochBatches(len(data.captions), BATCH_SIZE, seed=seed)

    def collate(items: list[tuple[str, str]]) -> Any:
        pictures = [read_image(path) for path, _ in items]
        inputs = processor(images=pictures, text=[CAPTION_PROMPT] * len(items), return_tensors="pt")
        captions = processor.tokenizer([caption for _, caption in items], padding=True, return_tensors="pt").input_ids
        labels = captions[:, 1:]  # the decoder begins with [CLS] by itself
        inputs["labels"] = labels.masked_fill(labels == processor.tokenizer.pad_token_id, -100)
        return inputs

    items = SeededItems(list(zip(data.image_paths, data.captions)))
    loader = DataLoader(items, batch_sampler=batches, collate_fn=collate)
    _train([model], lambda batch: model(**batch).loss, batches, loader, steps, rate=3e-3)
    with quiet_libraries():
        model.save_pretrained(folder)


def _train(models: list[Any], loss_of: Any, batches: EpochBatches, loader: Any, steps: int, rate: float) -> None:
    from tqdm import tqdm

    parameters = [parameter for model in models for parameter in model.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    done, epoch = 0, 0
    with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None) as progress:
        while done < steps:
            batches.set_position(epoch)
            for batch in loader:
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rates.step()
                done += 1
                progress.update()
                if done == steps:
                    break
            epoch += 1
    for model in models:
        model.eval()
    print(f"{type(models[0]).__name__}: {steps} steps, last loss {loss.item():.4f}")


@torch.no_grad()
def _scale_latents(vae: Any, loader: Any) -> None:
    """Set the factor that makes latent pictures have variance 1, as the noise schedule expects."""
    means = [vae.encode(batch["pixels"]).latent_dist.mean for batch, _ in zip(loader, range(8))]
    vae.register_to_config(scaling_factor=float(1 / torch.cat(means).std()))
