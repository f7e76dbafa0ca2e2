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
        slots, tokens = matching_places(img_token_mask, reference_attribute_num, attribute_embedding.shape[1])
        return self.fuse_at(text_embeddings, tokens, attribute_embedding.flatten(0, 2)[slots])

    def fuse_at(self, text_embeddings: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
        """Fuse references `[M, D]` at the places `tokens` `[M]` of the flattened positions of `[B, L, D]`; a new tensor."""
        flat = text_embeddings.flatten(0, 1)
        # An empty batch passes through too: its gradients are then zero, not absent, as distributed training needs.
        fused = self.fuse(flat[tokens], references.to(flat.dtype)).to(flat.dtype)
        return torch.index_put(flat, (tokens,), fused).view_as(text_embeddings)


def matching_places(img_token_mask: Tensor, reference_attribute_num: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The M valid references of a batch, and the marked positions that they belong to. Waits for a GPU.

    Args:
        img_token_mask: bool [B, L].
        reference_attribute_num: [B], how many slots of each sample are valid.
        slots: N of each sample.

    Returns:
        int64 [M] of the flattened [B, N], and int64 [M] of the flattened [B, L].

    Raises:
        ValueError: there are not as many valid references as marked positions.
    """
    valid = torch.arange(slots, device=reference_attribute_num.device) < reference_attribute_num[:, None]
    references, tokens = (marks.flatten().nonzero().flatten() for marks in (valid, img_token_mask))
    if len(references) != len(tokens):
        raise ValueError(f"{len(references)} reference images for {len(tokens)} marked tokens: they must be equal")
    return references, tokens
