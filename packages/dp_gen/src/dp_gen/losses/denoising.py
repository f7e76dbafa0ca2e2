"""The denoising loss, over the whole image or within the attributes' regions."""

import torch.nn.functional as F
from torch import Tensor


def attribute_region(seg_maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of the attributes' regions at latent size; soft at the borders.

    Args:
        seg_maps: [B, N, R, R], 0 or 1.
        size: height and width of the latents.

    Returns:
        float [B, 1, h, w] in [0, 1], bilinear without antialias as released.
    """
    union = (seg_maps.sum(dim=1, keepdim=True) > 0).float()
    return F.interpolate(union, size=size, mode="bilinear", align_corners=False)


def masked_mse(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean over all elements of `(m * prediction - m * target)**2` in float32.

    Zeros outside the region count in the mean: it is not divided by the region's area, as released.

    Args:
        prediction: [B, 4, h, w].
        target: [B, 4, h, w].
        region: m, [B, 1, h, w]; None is 1 everywhere.
    """
    if region is not None:
        prediction, target = prediction * region, target * region
    return F.mse_loss(prediction.float(), target.float())
