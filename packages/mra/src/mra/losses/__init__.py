"""The losses of MRA as functions of tensors: image-text contrast (ITC) and the sampling of hard negatives (ITM)."""

from mra.losses.contrastive import contrastive_loss, gather_rows
from mra.losses.matching import draw_negatives, matching_loss, negative_weights

__all__ = ["contrastive_loss", "draw_negatives", "gather_rows", "matching_loss", "negative_weights"]
