"""The losses of MRA as functions of tensors (paper section 3.3): image-text contrast (ITC) and matching (ITM).

The masked-word loss (MLM) is a plain cross-entropy and stands in `mra.model.network`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tbps_common.errors import InputError

_FLOOR = 1e-5


def contrastive_loss(image: Tensor, text: Tensor, ids: Tensor, temp: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the similarities with uniform targets over equal identities, mean of both directions.

    With S = V U^T / temp, P_ij = [id_i = id_j] and Y = P / (row sums of P), smoothed to (1 - e) Y + e / N:
    L = 1/2 (mean_i -sum_j Y_ij log softmax_j S_ij + mean_i -sum_j Y_ij log softmax_j S_ji).

    Args:
        image: `[N, D]` unit-norm image features V.
        text: `[N, D]` unit-norm text features U; row i describes image i.
        ids: `[N]` identities; equal ones are positives of each other.
        temp: scalar the similarities are divided by.
        smoothing: e, from 0 to below 1.

    Returns:
        Scalar, float32.
    """
    # The N x N products are a negligible part of a step, so they are not left to autocast's bfloat16.
    with torch.autocast(image.device.type, enabled=False):
        similarity = image.float() @ text.float().t() / temp
        positives = (ids.view(-1, 1) == ids.view(1, -1)).float()
        targets = positives / positives.sum(dim=1, keepdim=True)
        if smoothing > 0:
            targets = (1 - smoothing) * targets + smoothing / len(ids)
        return (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2


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
