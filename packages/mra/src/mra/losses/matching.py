"""Image-text matching: hard negatives drawn by similarity, and the two-class loss (paper section 3.3, "ITM")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tbps_common.errors import InputError

_FLOOR = 1e-5


@torch.no_grad()
def negative_weights(image: Tensor, text: Tensor, ids: Tensor, temp: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each other sample of the batch is drawn as a negative.

    Args:
        image: `[B, D]` unit-norm image features.
        text: `[B, D]` unit-norm text features.
        ids: `[B]` identities.
        temp: scalar the similarities are divided by.

    Returns:
        Unnormalised weights `[B, B]` of texts for each image, and of images for each text; 0 where the identities are
        equal. A row is all zero if the batch holds one identity only.
    """
    with torch.autocast(image.device.type, enabled=False):
        similarity = image.float() @ text.float().t() / temp
    same = ids.view(-1, 1) == ids.view(1, -1)
    texts_of_image = (similarity.softmax(dim=1) + _FLOOR).masked_fill(same, 0)
    images_of_text = (similarity.t().softmax(dim=1) + _FLOOR).masked_fill(same, 0)
    return texts_of_image, images_of_text


@torch.no_grad()
def draw_negatives(weights: Tensor) -> Tensor:
    """One column for each row, with probability proportional to its weight.

    The exponential race (argmin of E_j / w_j with standard exponential E_j) has the distribution of a multinomial draw
    per row; `torch.multinomial` itself would wait for the device to check the weights.

    Args:
        weights: `[B, B]`, not negative. A row without weight draws uniformly among the other positions.

    Returns:
        `[B]` int64 columns.

    Raises:
        InputError: a batch of one, which has no negative.
    """
    count = len(weights)
    if count < 2:
        raise InputError(
            "A training batch of one sample has no negatives for the matching loss: raise --bs to 2 or more."
        )
    others = 1.0 - torch.eye(count, dtype=weights.dtype, device=weights.device)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, others)
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1)


def matching_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of matching logits `[3B, 2]` (no match, match): B pairs that match, then 2B that do not."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(logits) // 3] = 1
    return F.cross_entropy(logits.float(), labels)
