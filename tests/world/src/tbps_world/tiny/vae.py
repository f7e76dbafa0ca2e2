"""A start for tiny auto-encoders that stand for Stable Diffusion's, so that what a toy paints has colours.

With random weights such a network needs hours to find the colours; as a codec that can be written down (the mean colour of
a square of pixels) it has them at once, and training adds the detail.
"""

from typing import Any

import torch
from torch import Tensor, nn

COLOURS = 3
_LATENT_LOG_VARIANCE = -8.0
_NOISE = 0.3  # of the default weights, left on top of the written-down ones: what the detail grows from


def start_as_mean_colours(vae: Any) -> None:
    """Set the weights so that the first latents are the mean colours of a square of pixels, and decoding paints them.

    Every colour travels as a pair of channels (x, -x): the pair has mean 0, so that GroupNorm only scales it, and
    silu(x) - silu(-x) = x. Residual branches start at zero. The last latent is what a random filter sees.

    Args:
        vae: `AutoencoderKL` of diffusers, changed in place: 4 latent channels, at least 8 channels everywhere, an even
            number of channels per group.

    Raises:
        ValueError: it has other sizes.
    """
    latents, widths, groups = vae.config.latent_channels, vae.config.block_out_channels, vae.config.norm_num_groups
    if latents != COLOURS + 1 or min(widths) < 2 * latents or any(width % (2 * groups) for width in widths):
        raise ValueError(
            f"the auto-encoder has {latents} latent channels, widths {widths} and {groups} groups; it needs 4, widths of "
            "8 or more, and an even number of channels per group"
        )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif name.endswith((".conv_shortcut", "upsamplers.0.conv")):
                _put(module, torch.eye(min(module.weight.shape[:2])))
            elif name.endswith("downsamplers.0.conv"):
                _put(module, torch.eye(module.weight.shape[0]), mean=True)  # of 2 x 2 pixels
        first = vae.encoder.conv_in
        _put(first, _pairs(COLOURS))
        first.weight[2 * COLOURS + 1 :: 2] = -first.weight[2 * COLOURS :: 2]
        first.bias.zero_()
        _put(vae.encoder.conv_out, _pairs(latents).T)
        _put(vae.decoder.conv_in, _pairs(latents))
        _put(vae.decoder.conv_out, _pairs(COLOURS).T)
        vae.encoder.conv_out.weight[latents:] = 0
        vae.encoder.conv_out.bias[latents:] = _LATENT_LOG_VARIANCE
        for module in (vae.quant_conv, vae.post_quant_conv):
            nn.init.zeros_(module.bias)
            module.weight.copy_(torch.eye(len(module.weight))[:, :, None, None])


def _pairs(channels: int) -> Tensor:
    """[2 * channels, channels]: x -> (x, -x) for every channel."""
    return torch.stack([torch.eye(channels), -torch.eye(channels)], dim=1).flatten(0, 1)


def _put(conv: nn.Conv2d, matrix: Tensor, *, mean: bool = False) -> None:
    """Let the first channels of a convolution apply `matrix` at the middle pixel, or to the mean of 2 x 2 pixels."""
    rows, columns = matrix.shape
    conv.weight *= _NOISE
    conv.weight[:rows] = 0
    if conv.bias is not None:
        conv.bias[:rows] = 0
    if mean:
        conv.weight[:rows, :columns, :2, :2] = matrix[:, :, None, None] / 4
    else:
        middle = conv.weight.shape[-1] // 2
        conv.weight[:rows, :columns, middle, middle] = matrix
