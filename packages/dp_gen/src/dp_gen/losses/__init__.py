"""The two losses of the training: denoising within the attributes' regions, and localisation of the attention."""

from dp_gen.losses.denoising import attribute_region, masked_mse
from dp_gen.losses.localization import BalancedL1Loss, attribute_localization_loss

__all__ = ["BalancedL1Loss", "attribute_localization_loss", "attribute_region", "masked_mse"]
