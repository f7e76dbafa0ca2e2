"""Random clustered features: the same for every process that is given the same sizes and seed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tbps_common.bench.presets import Sizes

SEED = 20250711
_CHUNK_ELEMENTS = 1 << 24
# Tokens of an image that show its person; the others are noise.
_TELLING_TOKENS = 8
_DISTANCE = 4.5


@dataclass(frozen=True)
class Features:
    """Features and identities as `retrieve` takes them."""

    query: Tensor
    gallery: Tensor
    q_pids: Tensor
    g_pids: Tensor


def make_features(sizes: Sizes, device: torch.device) -> Features:
    """Unit vectors around one random direction for each identity; each identity has `positives` gallery images.

    The noise is such that the ranking is neither perfect nor chance.
    """
    generator = torch.Generator().manual_seed(SEED)
    g_pids = _gallery_ids(sizes, generator)
    q_pids = g_pids[torch.randint(len(g_pids), (sizes.queries,), generator=generator)]
    attributes = sizes.reduce.startswith("attr_")
    per_identity = (sizes.tokens, sizes.dim) if attributes else (sizes.dim,)
    centres = normalize(torch.randn(int(g_pids.max()) + 1, *per_identity, generator=generator), dim=-1)
    # Standard deviations of a stranger's inner product by which a positive stands out. Averages over attributes or the
    # best tokens have a smaller deviation, so less is enough.
    distance = _DISTANCE if sizes.reduce == "dot" else _DISTANCE / math.sqrt(min(sizes.tokens, _TELLING_TOKENS))
    noise = math.sqrt(max(0.05, math.sqrt(sizes.dim) / distance - 1))
    query = _around(centres, q_pids, per_identity, noise, None, generator)
    shape = per_identity if sizes.reduce == "dot" else (sizes.tokens, sizes.dim)
    telling = None if attributes or sizes.reduce == "dot" else _TELLING_TOKENS
    gallery = _around(centres, g_pids, shape, noise, telling, generator)
    return Features(query.to(device), gallery.to(device), q_pids, g_pids)


def _gallery_ids(sizes: Sizes, generator: torch.Generator) -> Tensor:
    low, high = sizes.positives
    counts = torch.randint(low, high + 1, (sizes.gallery // low + 1,), generator=generator)
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts)[: sizes.gallery]
    return ids[torch.randperm(sizes.gallery, generator=generator)]


def _around(
    centres: Tensor, ids: Tensor, shape: tuple[int, ...], noise: float, telling: int | None, generator: torch.Generator
) -> Tensor:
    features = torch.empty(len(ids), *shape)
    step = max(1, _CHUNK_ELEMENTS // features[0].numel())
    for start in range(0, len(ids), step):
        part = features[start : start + step].normal_(generator=generator).mul_(noise / math.sqrt(shape[-1]))
        own = centres[ids[start : start + step]]
        if telling is None:
            part += own
        else:
            part[:, :telling] += own.unsqueeze(1)
        part.div_(part.norm(dim=-1, keepdim=True))
    return features
