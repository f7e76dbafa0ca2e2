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

COLOURS = 3
BATCH = 4
LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-6
LATENT_LOG_VARIANCE = -8.0
NOISE = 0.3  # of the default weights, left on top of the written-down ones: what the detail grows from


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


def start_as_mean_colours(vae: Any) -> None:
    """Set the weights so that the first latents are the mean colours of 8 x 8 pixels, and decoding paints them.

    The last latent is what a random filter sees. Every colour travels as a pair of channels (x, -x): the pair has mean 0, so that GroupNorm only scales it, and
    silu(x) - silu(-x) = x. Residual branches start at zero.

    Args:
        vae: `AutoencoderKL` with 4 latent channels and an even number of channels per group.
    """
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif name.endswith((".conv_shortcut", "upsamplers.0.conv")):
                _put(module, torch.eye(min(module.weight.shape[:2])))
            elif name.endswith("downsamplers.0.conv"):
                _put(module, torch.eye(module.weight.shape[0]), mean=True)  # of 2 x 2 pixels
        latents = vae.config.latent_channels
        first = vae.encoder.conv_in
        _put(first, _pairs(COLOURS))
        first.weight[2 * COLOURS + 1 :: 2] = -first.weight[2 * COLOURS :: 2]
        first.bias.zero_()
        _put(vae.encoder.conv_out, _pairs(latents).T)
        _put(vae.decoder.conv_in, _pairs(latents))
        _put(vae.decoder.conv_out, _pairs(COLOURS).T)
        vae.encoder.conv_out.weight[latents:] = 0
        vae.encoder.conv_out.bias[latents:] = LATENT_LOG_VARIANCE
        for module in (vae.quant_conv, vae.post_quant_conv):
            nn.init.zeros_(module.bias)
            module.weight.copy_(torch.eye(len(module.weight))[:, :, None, None])


def _pairs(channels: int) -> Tensor:
    """[2 * channels, channels]: x -> (x, -x) for every channel."""
    return torch.stack([torch.eye(channels), -torch.eye(channels)], dim=1).flatten(0, 1)


def _put(conv: nn.Conv2d, matrix: Tensor, *, mean: bool = False) -> None:
    """Let the first channels of a convolution apply `matrix` at the middle pixel, or to the mean of 2 x 2 pixels."""
    rows, columns = matrix.shape
    conv.weight *= NOISE
    conv.weight[:rows] = 0
    if conv.bias is not None:
        conv.bias[:rows] = 0
    if mean:
        conv.weight[:rows, :columns, :2, :2] = matrix[:, :, None, None] / 4
    else:
        middle = conv.weight.shape[-1] // 2
        conv.weight[:rows, :columns, middle, middle] = matrix


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
