"""The direct forms: each loss and metric as its definition reads, with broadcasts, column slices and loops.

They give the same numbers as the package's own forms (the benchmark checks it) and exist to be measured against.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fafa.losses import compute_sdm

if TYPE_CHECKING:
    from fafa.model import Blip2FAFACPR

BLOCK = 500


def direct_dispersion(features: Tensor, margin: float, indices: Tensor | None = None) -> Tensor:
    """FD with a cosine similarity of all pairs of tokens: an n x n x D broadcast."""
    tokens = features.reshape(-1, features.shape[-1])
    if indices is not None:
        tokens = tokens[indices]
    cosine = F.cosine_similarity(tokens[:, None, :], tokens[None, :, :], dim=-1)
    diagonal = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
    return F.relu(cosine.masked_fill(diagonal, -1.0) - margin).mean()


def direct_token_similarity(query: Tensor, targets: Tensor) -> Tensor:
    """`[Q, D]` and `[G, T, D]` to `[Q, G, T]` by a broadcast matrix product."""
    return torch.matmul(query[:, None, None, :], targets.transpose(1, 2)[None]).squeeze(2)


def direct_evaluation_similarity(query: Tensor, gallery: Tensor, k: int) -> Tensor:
    """`[Q, G]` from `[Q, G, T]`, which is filled in blocks and then reduced."""
    every = query.new_empty(len(query), *gallery.shape[:2])
    for i in range(0, len(query), BLOCK):
        for j in range(0, len(gallery), BLOCK):
            every[i : i + BLOCK, j : j + BLOCK] = direct_token_similarity(query[i : i + BLOCK], gallery[j : j + BLOCK])
    return every.topk(k, dim=-1).values.mean(dim=-1)


def direct_metrics(similarity: Tensor, q_ids: Tensor, g_ids: Tensor) -> tuple[float, float]:
    """mAP and mINP in percent: a full sort, one column after the other for AP, one query after the other for INP."""
    order = torch.argsort(similarity, dim=1, descending=True)
    matches = g_ids[order].eq(q_ids[:, None])
    found = matches.cumsum(1)
    inp = [(found[i][-1] / (match.nonzero()[-1] + 1.0)).squeeze() for i, match in enumerate(matches)]
    precision = torch.stack([found[:, i] / (i + 1.0) for i in range(found.shape[1])], dim=1) * matches
    average = precision.sum(1) / matches.sum(1)
    return 100 * average.mean().item(), 100 * torch.stack(inp).mean().item()


def direct_losses(model: "Blip2FAFACPR", samples: dict[str, Any], draws: dict[str, Any]) -> dict[str, Tensor]:
    """The objectives with one ViT call each for references and targets, and the direct forms above."""
    fused = model.fused_hidden(model.image_states(samples["image"]), samples["text_input"])
    hidden = model.image_hidden(model.image_states(samples["target"]))
    noisy = model.uncertainty(hidden, draws["dsu_gate"], draws["dsu_eps_beta"], draws["dsu_eps_gamma"])
    targets = F.normalize(model.vision_proj(noisy), dim=-1)
    query = F.normalize(model.text_proj(fused), dim=-1)
    pooled = direct_token_similarity(query, targets).topk(model.fda_k, dim=-1).values.mean(dim=-1)
    return {
        "loss_fd": direct_dispersion(targets.float(), model.dispersion_loss.margin, draws.get("fd_indices")),
        "loss_fda": compute_sdm(pooled / model.temp, samples["query_id"]),
        "loss_mfr": model.mlm_predictor(fused, hidden.mean(dim=1), draws["mfr_mask_A"], draws["mfr_mask_B"]),
    }
