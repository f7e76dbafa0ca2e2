"""Training the tiny VAE on the images of a training folder for a minute, so that generated pictures can be looked at.

A VAE of random weights decodes every latent to noise, and one of eight channels needs hours to find the colours. This one
starts as a codec that can be written down (the mean colour of every 8 x 8 pixels) and learns the detail from there.
"""

import argparse
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbps_world.tiny.vae import start_as_mean_colours

BATCH = 4
LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-6


def train_images(root: str | os.PathLike[str], resolution: int, limit: int = 512) -> Tensor:
    """Images of the split "train" as the training sees them, [n, 3, R, R] in [-1, 1].

    Raises:
        DatasetError: the folder cannot be used.
    """
    from dp_gen.data import TrainingFolder, Transform4TestWithSegmap

    folder = TrainingFolder(root, "train")
    transform = Transform4TestWithSegmap(argparse.Namespace(resolution=resolution))
    pictures = []
    for index in range(0, len(folder), -(-len(folder) // limit)):
        image, _, mask, _ = folder.load(index)
        pictures.append(transform(image, mask)[0])
    return torch.stack(pictures)


def train_vae(vae: Any, images: Tensor, updates: int, seed: int = 0, *, show: bool = False) -> float:
    """Train on the images, then set the scaling factor so that latents have standard deviation 1.

    Args:
        vae: changed in place; it is left in evaluation mode.
        images: [n, 3, R, R] in [-1, 1].
        updates: of Adam.
        seed: of batches and noise.
        show: with a progress bar.

    Returns:
        Mean squared error of the reconstructions, of pixels in [-1, 1].
    """
    from tqdm import trange

    start_as_mean_colours(vae)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min(1.0, (update + 1) / 20) * max(0.0, 1 - update / updates)
    )
    vae.train()
    for _ in trange(updates, desc="training the VAE", disable=not show):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = F.mse_loss(decoded, batch) + F.l1_loss(decoded, batch) + KL_WEIGHT * posterior.kl().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    vae.eval()
    return _measure(vae, images)


@torch.no_grad()
def _measure(vae: Any, images: Tensor) -> float:
    latents, errors = [], []
    for batch in images.split(BATCH):
        means = vae.encode(batch).latent_dist.mean
        latents.append(means)
        errors.append((vae.decode(means).sample - batch).square().mean(dim=(1, 2, 3)))
    vae.register_to_config(scaling_factor=round(1 / float(torch.cat(latents).std()), 5))
    return float(torch.cat(errors).mean())
