"""Re-ranking: the fusion encoder judges the best images of each caption.

The released code runs one caption at a time against its k images, all tokens through all layers. The same numbers come
out of less work:

* only the first token's output is used, so a caption is cut at its last word, and the last layer computes that token only;
* the self-attention of the first fusion layer sees the caption alone: once per caption;
* keys and values of an image's tokens do not depend on the caption: once per image, for a chunk of images at a time;
* the pairs of a chunk are sorted by length and handled together, as many as fit a budget of tokens.

Which pairs are handled together never depends on the number of processes, so neither do the scores, to the last bit.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mra.model.bert import KeysValues, text_mask
from mra.model.network import Retrieval
from tbps_common.ranking import best_of_rows, rerank
from tbps_common.ranking.memory import is_out_of_memory, release_cached_memory

# Images whose keys and values are held at a time, and text tokens handled at a time.
IMAGE_CHUNK = 40
_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
# Weight of the first-stage scores in the final ones.
SIMILARITY_WEIGHT = 0.002


@torch.no_grad()
def itm_rerank(
    model: Retrieval,
    sims: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_atts: Tensor,
    k: int,
    himage_embeds: Tensor | None = None,
    score_world: int = 1,
) -> Tensor:
    """Final scores: matching logits of each caption's k best images, fused with the similarities.

    Args:
        model: the network; call `model.eval()` first.
        sims: `[Q, G]` similarities.
        image_embeds: `[G, 1 + L, D_v]`.
        text_embeds: `[Q, T, D_t]`.
        text_atts: `[Q, T]`, 1 for tokens.
        k: images of each caption that are judged, at most G.
        himage_embeds: tokens of the mirrored images; the two normalised logits are then averaged.
        score_world: number of processes whose released score is wanted (spec section 8), without its constant
            `score_world - 1`, which cannot change a ranking; 1 is the paper's formula.

    Returns:
        `[Q, G]`, float32, on the device of `sims`.
    """
    candidates = best_of_rows(sims, min(k, sims.shape[1]))[1]
    matcher = Matcher(model, text_embeds, text_atts)
    logits = [
        match_logits(matcher, candidates, embeds) for embeds in (image_embeds, himage_embeds) if embeds is not None
    ]
    fused = rerank(
        sims,
        candidates,
        logits[0],
        itm_flip=logits[1] if len(logits) > 1 else None,
        weight=SIMILARITY_WEIGHT,
        legacy_world_size=score_world,
    )
    return fused.float()


def match_logits(matcher: "Matcher", candidates: Tensor, image_embeds: Tensor) -> Tensor:
    """Logits of the class "match" `[Q, k]`, float32, for the images `candidates` `[Q, k]` of each caption."""
    pairs = Pairs(candidates)
    logits = torch.empty(candidates.numel(), device=candidates.device)
    for start in range(0, len(image_embeds), IMAGE_CHUNK):
        chunk = image_embeds[start : start + IMAGE_CHUNK]
        positions, images, queries = pairs.of_images(start, start + len(chunk))
        logits[positions.to(logits.device)] = matcher.logits(chunk, images, queries).to(logits.device)
    return logits.view(candidates.shape)


class Pairs:
    """The pairs of `candidates` `[Q, k]`, ordered by image."""

    def __init__(self, candidates: Tensor):
        self._k = candidates.shape[1]
        self._images, self._order = torch.sort(candidates.cpu().flatten(), stable=True)

    def of_images(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs with the images `start <= g < stop`: position in the flattened candidates, `g - start`, caption."""
        first, last = torch.searchsorted(self._images, torch.tensor([start, stop])).tolist()
        positions = self._order[first:last]
        return positions, self._images[first:last] - start, positions.div(self._k, rounding_mode="floor")


class Matcher:
    """The fusion encoder for given captions: all that depends on the captions alone is computed once.

    Args:
        model: the network, in evaluation mode.
        text_embeds: `[Q, T, D_t]`; moved to the model's device.
        text_atts: `[Q, T]`.
        tokens: text tokens handled at a time; by default by the kind of device. Halved where memory runs out.
    """

    def __init__(self, model: Retrieval, text_embeds: Tensor, text_atts: Tensor, tokens: int | None = None):
        self._model = model
        self._layers = list(model.text_encoder.fusion_layers)
        self._device = model.temp.device
        self._tokens = tokens or _TOKENS.get(self._device.type, _TOKENS["cpu"])
        atts = text_atts.cpu()
        place = torch.arange(1, atts.shape[1] + 1)
        self._lengths = (place * (atts != 0)).amax(dim=1).clamp(min=1)
        # Masks are needed only where a caption is shorter than its batch, or has gaps.
        self._gapless = bool((atts.sum(dim=1) == self._lengths).all())
        self._mask = text_mask(text_atts.to(self._device, non_blocking=True))
        longest = int(self._lengths.max())
        self._mask = self._mask[..., :longest]
        self._attended = self._self_attention(text_embeds[:, :longest])

    @torch.no_grad()
    def _self_attention(self, text_embeds: Tensor) -> Tensor:
        """Self-attention of the first fusion layer `[Q, T, D_t]`."""
        attention, parts = self._layers[0].attention, []
        step = max(1, self._tokens // text_embeds.shape[1])
        for hidden, mask in zip(text_embeds.split(step), self._mask.split(step)):
            hidden = hidden.to(self._device, non_blocking=True)
            parts.append(attention(hidden, attention.self.keys_values(hidden), mask))
        return torch.cat(parts)

    @torch.no_grad()
    def logits(self, image_embeds: Tensor, images: Tensor, queries: Tensor) -> Tensor:
        """Logits of the class "match".

        Args:
            image_embeds: `[C, 1 + L, D_v]` of some images; moved to the model's device.
            images: `[P]` rows of `image_embeds`, on the CPU.
            queries: `[P]` captions, on the CPU.

        Returns:
            `[P]`, float32, on the model's device.
        """
        keys = [
            KeysValues(*(part.contiguous() for part in image))
            for image in self._model.text_encoder.image_keys(image_embeds.to(self._device, non_blocking=True))
        ]
        result = torch.empty(len(images), device=self._device)
        for part in self._batches(queries):
            self._in_memory(part, lambda some: self.judge(keys, images[some], queries[some]), result)
        return result

    def _in_memory(self, part: Tensor, judge: Callable[[Tensor], Tensor], result: Tensor) -> None:
        """Judge a batch; where memory runs out, in halves."""
        try:
            result[part.to(self._device, non_blocking=True)] = judge(part)
            return
        except Exception as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler: the exception keeps the tensors of the failed batch alive.
        release_cached_memory()
        self._tokens = max(self._tokens // 2, 1)
        for half in part.tensor_split(2):
            self._in_memory(half, judge, result)

    def _batches(self, queries: Tensor) -> Iterator[Tensor]:
        """Positions of pairs handled together: of similar lengths, within the budget of tokens."""
        lengths, order = torch.sort(self._lengths[queries], stable=True)
        while len(order):
            size = (torch.arange(1, len(order) + 1) * lengths <= self._tokens).sum().clamp(min=1)
            yield order[:size]
            lengths, order = lengths[size:], order[size:]

    def judge(self, keys: list[KeysValues], images: Tensor, queries: Tensor) -> Tensor:
        """Matching logits `[pairs]` of the given images and queries, one of each a pair, in one batch."""
        lengths = self._lengths[queries]
        longest = int(lengths.max())
        rows = queries.to(self._device, non_blocking=True)
        padded = not self._gapless or int(lengths.min()) < longest
        mask = self._mask[..., :longest][rows] if padded else None
        image_rows = images.to(self._device, non_blocking=True)
        first_token = torch.zeros((len(rows), 1), dtype=torch.long, device=self._device)
        last = len(self._layers) - 1
        hidden = self._attended[:, : longest if last else 1][rows]
        for number, (layer, image) in enumerate(zip(self._layers, keys)):
            image = image.rows(image_rows)
            if number == 0:
                hidden = layer.finish(hidden, image, None)
            else:
                hidden = layer(hidden, mask, image, keep=first_token if number == last else None)
        return self._model.itm_head(hidden[:, 0])[:, 1].float()
