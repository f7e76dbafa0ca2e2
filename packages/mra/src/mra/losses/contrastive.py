"""Image-text contrastive loss over the features of all processes (paper section 3.3, "ITC")."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gather_rows(values: Tensor) -> Tensor:
    """Rows of all processes of the default group, in rank order; `values` itself for a single process.

    The gradient of the result reaches the rows of this process only and is not summed over the processes: every process
    computes the same global loss, so with DistributedDataParallel's mean the gradient of an encoder is 1 / world of that
    of one process with the joined batch. That is the released recipe.

    Args:
        values: `[B, ...]`, B equal on all processes.

    Returns:
        `[world * B, ...]`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    own = values.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    parts[dist.get_rank()] = values
    return torch.cat(parts)


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
