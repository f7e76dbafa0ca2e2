"""The controller: puts the feature of each reference image into the caption's features (paper, overview figure)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """`y = W2 GELU(W1 LN(x) + b1) + b2`, plus `x` with `use_residual`.

    The layers have the names of the checkpoint, and come in its order, which is the optimizer's too.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, use_residual: bool = True):
        if use_residual and in_dim != out_dim:
            raise ValueError(f"a residual MLP needs equal sizes, not {in_dim} and {out_dim}")
        super().__init__()
        self.use_residual = use_residual
        widths = (in_dim, hidden_dim, out_dim)
        self.layernorm = nn.LayerNorm(widths[0])
        self.fc1, self.fc2 = (nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]"""
        y = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return y + x if self.use_residual else y


class DiversePersonController(nn.Module):
    """Replaces the text feature at each image token by a fusion with the reference image's feature.

    Args:
        embedding_dim: D, width of text features and of image features.
    """

    def __init__(self, embedding_dim: int):
        super().__init__()
        text_and_image, width = 2 * embedding_dim, embedding_dim
        self.mlp1 = MLP(in_dim=text_and_image, hidden_dim=width, out_dim=width, use_residual=False)
        self.mlp2 = MLP(in_dim=width, hidden_dim=width, out_dim=width)
        self.layer_norm = nn.LayerNorm(width)

    def fuse(self, text: Tensor, attribute: Tensor) -> Tensor:
        """`LN(mlp2(mlp1([text; attribute]) + text))`, all [M, D]."""
        mixed = self.mlp1(torch.cat([text, attribute], dim=-1)) + text
        return self.layer_norm(self.mlp2(mixed))

    def forward(
        self,
        text_embeddings: Tensor,
        attribute_embedding: Tensor,
        img_token_mask: Tensor,
        reference_attribute_num: Tensor,
    ) -> Tensor:
        """Fuse at the marked positions; all others keep their text feature.

        The k-th valid reference of a batch (sample by sample, slot by slot) belongs to the k-th marked position.

        Args:
            text_embeddings: [B, L, D].
            attribute_embedding: [B, N, 1, D].
            img_token_mask: bool [B, L].
            reference_attribute_num: [B], how many of the N slots of each sample are valid.

        Returns:
            [B, L, D], a new tensor.

        Raises:
            ValueError: there are not as many valid references as marked positions.
        """
        valid = valid_slots(attribute_embedding.shape[1], reference_attribute_num)
        references = attribute_embedding.squeeze(2)[valid].to(text_embeddings.dtype)
        marked = text_embeddings[img_token_mask]
        if len(references) != len(marked):
            raise ValueError(f"{len(references)} reference images for {len(marked)} marked tokens: they must be equal")
        # An empty batch passes through too: its gradients are then zero, not absent, as distributed training needs.
        fused = self.fuse(marked, references).to(text_embeddings.dtype)
        return torch.index_put(text_embeddings, (img_token_mask,), fused)


def valid_slots(slots: int, reference_attribute_num: Tensor) -> Tensor:
    """bool [B, N]: the first `reference_attribute_num[b]` slots of each sample."""
    return torch.arange(slots, device=reference_attribute_num.device) < reference_attribute_num[:, None]
