"""Contrastive loss and similarity-distribution matching against soft targets of equal identity.

Similarities are `[B, N]`: B rows of this process against the N = B * R candidates of all R processes (`gather_rows`), in
rank order, and already multiplied by the inverse temperature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tbps_common.run.distributed import gather_rows

__all__ = ["build_targets", "compute_itc", "compute_sdm", "gather_rows"]

SDM_EPSILON = 1e-6


def build_targets(ids: Tensor, ids_all: Tensor | None = None) -> Tensor:
    """Row-normalised identity targets `Q_rc = [id_r = id_c] / sum_c' [id_r = id_c']`, float32.

    Args:
        ids: `[B]` or `[B, 1]` identities of the rows.
        ids_all: `[N]` or `[N, 1]` identities of the columns (all processes); `ids` itself if None. Every row's identity
            must be among them.

    Returns:
        `[B, N]`; every row sums to 1.
    """
    rows = ids.reshape(-1, 1)
    columns = (ids if ids_all is None else ids_all).reshape(1, -1)
    same = (rows == columns).float()  # (B, N)
    return same / same.sum(dim=1, keepdim=True)


def compute_itc(sim: Tensor, targets: Tensor) -> Tensor:
    """Image-text contrast, `mean_r(-sum_c Q_rc log softmax_r(S)_c)`.

    Args:
        sim: `[B, N]` scaled similarities S.
        targets: `[B, N]` distribution Q of every row.
    """
    return -(targets * F.log_softmax(sim, dim=1)).sum(dim=1).mean()


def compute_sdm(sim: Tensor, targets: Tensor, epsilon: float = SDM_EPSILON) -> Tensor:
    """Similarity-distribution matching (IRRA, CVPR 2023), `mean_r(sum_c P_rc (log P_rc - ln(Q_rc + epsilon)))`.

    P is the softmax over a row of S. Unlike IRRA's, S is scaled by the learnt temperature of the contrastive loss.

    Args:
        sim: `[B, N]` scaled similarities S.
        targets: `[B, N]` distribution Q of every row.
        epsilon: keeps the logarithm of absent identities finite.
    """
    log_p = F.log_softmax(sim, dim=1)
    return (log_p.exp() * (log_p - torch.log(targets + epsilon))).sum(dim=1).mean()
