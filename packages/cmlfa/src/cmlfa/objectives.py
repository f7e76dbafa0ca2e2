"""The losses of CMLFA as pure functions of tensors, without the weights given to them in the total.

Features are `[B, D]`, one row per image-text pair; losses are scalars over the rows of one process (nothing is gathered
from other processes, as in the released code).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8


def compute_sdm(image: Tensor, text: Tensor, pid: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Similarity distribution matching: KL(p || q) from text to image and back (IRRA, CVPR 2023, eq. 6-8).

    `p` is the softmax over one row of the scaled cosine similarities, `q` is uniform over the rows of the same person.

    Args:
        image: `[B, D]` image features, not normalised.
        text: `[B, D]` text features, not normalised; row i describes image i.
        pid: `[B]` person ids; equal ids are positives of each other.
        logit_scale: inverse temperature that multiplies the cosine.

    Returns:
        Scalar, the sum of the two directions, each a mean over B rows.
    """
    same = _same_person(pid, image.dtype)
    log_target = torch.log(same / same.sum(dim=1, keepdim=True) + EPSILON)
    text_to_image = logit_scale * _unit(text) @ _unit(image).t()
    return _kl_rows(text_to_image.t(), log_target) + _kl_rows(text_to_image, log_target)


def compute_itc(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Image-text contrast: each row's own partner against the other rows, in both directions (InfoNCE).

    Other captions of the same person count as negatives.

    Args:
        image: `[B, D]` image features, not normalised.
        text: `[B, D]` text features, not normalised; row i describes image i.
        logit_scale: inverse temperature that multiplies the cosine.
    """
    logits = (logit_scale * _unit(image)) @ _unit(text).t()
    partner = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, partner) + F.cross_entropy(logits.t(), partner)) / 2


def compute_id(image_logits: Tensor, text_logits: Tensor, labels: Tensor) -> Tensor:
    """Identity classification: mean of the cross entropies of the image and of the text logits `[B, classes]`."""
    return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def compute_mlm(scores: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling: mean cross entropy over the labelled positions; label 0 means "not masked".

    Args:
        scores: `[..., vocabulary]` logits.
        labels: `[...]` token ids to predict, 0 elsewhere.
    """
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), ignore_index=0)


def compute_cmpm(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018): features projected on the other side's unit vectors.

    The target `q_ij = y_ij / ||y_j||_2` is a distribution only when every person occurs once, as in the family's code.

    Args:
        image: `[B, D]` image features, not normalised.
        text: `[B, D]` text features, not normalised; row i describes image i.
        labels: `[B]` person ids.
    """
    same = _same_person(labels, image.dtype)
    log_target = torch.log(same / same.norm(dim=1) + EPSILON)
    return _kl_rows(image @ _unit(text).t(), log_target) + _kl_rows(text @ _unit(image).t(), log_target)


def _unit(features: Tensor) -> Tensor:
    # Plain division as in the released code: a zero vector gives NaN instead of silently matching nothing.
    return features / features.norm(dim=1, keepdim=True)


def _same_person(pid: Tensor, dtype: torch.dtype) -> Tensor:
    pid = pid.reshape(-1)
    return (pid[:, None] == pid[None, :]).to(dtype)  # (B, B)


def _kl_rows(logits: Tensor, log_target: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(logits) || target)."""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * (log_p - log_target)).sum(dim=1).mean()
