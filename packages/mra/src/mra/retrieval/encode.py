"""Embeddings and unit-norm features of texts and images, in batches, without gradients."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mra.model.network import Retrieval


@torch.no_grad()
def encode_texts(model: Retrieval, ids: Tensor, atts: Tensor, batch_size: int = 200) -> tuple[Tensor, Tensor]:
    """Encode tokenised texts; call `model.eval()` first.

    Args:
        model: the network, on the device of the inputs.
        ids: `[N, T]` token ids, padded to the configuration's `max_tokens` (the padding is part of the feature).
        atts: `[N, T]`, 1 for tokens.
        batch_size: texts encoded at once.

    Returns:
        Token embeddings `[N, T, D_t]` and unit-norm features `[N, D]`, float32, on the device of `ids`.
    """
    embeds, features = [], []
    for ids_part, atts_part in zip(ids.split(batch_size), atts.split(batch_size)):
        embeds.append(model.get_text_embeds(ids_part, atts_part).float())
        features.append(normalize(model.get_text_feat(embeds[-1]).float(), dim=-1))
    return torch.cat(embeds), torch.cat(features)


@torch.no_grad()
def encode_images(model: Retrieval, images: Tensor, batch_size: int = 40) -> tuple[Tensor, Tensor]:
    """Encode images; call `model.eval()` first.

    Args:
        model: the network, on the device of the images.
        images: `[N, 3, h, w]`, transformed as for testing.
        batch_size: images encoded at once.

    Returns:
        Image tokens `[N, 1 + L, D_v]` and unit-norm features `[N, D]`, float32, on the device of `images`.
    """
    embeds, features = [], []
    for part in images.split(batch_size):
        embeds.append(model.get_vision_embeds(part)[0].float())
        features.append(normalize(model.get_image_feat(embeds[-1]).float(), dim=-1))
    return torch.cat(embeds), torch.cat(features)
