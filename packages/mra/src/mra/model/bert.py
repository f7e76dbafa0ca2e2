"""The BERT text encoder (first layers) and fusion encoder (last layers, with cross-attention to the image).

Embeddings, feed-forward parts and MLM head are transformers' classes, whose parameters have the names of the official
checkpoints. The attention is written out: its cross-attention reads image tokens of another width, and keys and values
of an image are computed once however many texts look at it.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertIntermediate,
    BertOnlyMLMHead,
    BertOutput,
    BertSelfOutput,
)

from mra.model.settings import TextSettings

# Added to the attention scores of masked positions. Text: the constant of the released code. Image: large enough for
# any score, small enough for bfloat16.
TEXT_MASK = -10000.0
IMAGE_MASK = -1e9


class KeysValues(NamedTuple):
    """Keys and values of one attention, both `[B, heads, T, D / heads]`."""

    keys: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> "KeysValues":
        """Those of some rows of the batch (repeats allowed)."""
        return KeysValues(self.keys[index], self.values[index])


class Projections(nn.Module):
    """The query, key and value layers of an attention."""

    def __init__(self, config: BertConfig, source_width: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)

    def queries(self, hidden: Tensor) -> Tensor:
        return self._split(self.query(hidden))

    def keys_values(self, source: Tensor) -> KeysValues:
        return KeysValues(self._split(self.key(source)), self._split(self.value(source)))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)


class Attention(nn.Module):
    """Attention to given keys and values, with BERT's output layer and residual connection."""

    def __init__(self, config: BertConfig, source_width: int):
        super().__init__()
        self.self = Projections(config, source_width)
        self.output = BertSelfOutput(config)
        self.dropout = float(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, source: KeysValues, mask: Tensor | None) -> Tensor:
        """`hidden` `[B, T, D]` looks at `source`; `mask` is added to the scores, broadcast to `[B, heads, T, S]`."""
        context = F.scaled_dot_product_attention(
            self.self.queries(hidden), *source, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(context.transpose(1, 2).flatten(2), hidden)


class TextLayer(nn.Module):
    """A BERT layer; with `source_width` it has cross-attention between self-attention and feed-forward part."""

    def __init__(self, config: BertConfig, source_width: int | None):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if source_width is not None:
            self.crossattention = Attention(config, source_width)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        image: KeysValues | None = None,
        image_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`, or `[B, M, D]` for the positions `keep` `[B, M]` (all others are only looked at)."""
        source = self.attention.self.keys_values(hidden)
        if keep is not None:
            hidden = hidden.gather(1, keep.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        return self.finish(self.attention(hidden, source, mask), image, image_mask)

    def finish(self, attended: Tensor, image: KeysValues | None, image_mask: Tensor | None) -> Tensor:
        """What follows the self-attention."""
        if image is not None:
            attended = self.crossattention(attended, image, image_mask)
        return self.output(self.intermediate(attended), attended)


class TextEncoder(nn.Module):
    """All layers: `fusion_layer` of them encode text alone, the others fuse it with an image."""

    def __init__(self, settings: TextSettings, image_width: int):
        super().__init__()
        config = BertConfig(**settings.model_dump(exclude={"fusion_layer"}))
        self.fusion_layer = settings.fusion_layer
        self.bert = nn.Module()
        self.bert.embeddings = BertEmbeddings(config)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            TextLayer(config, image_width if number >= settings.fusion_layer else None)
            for number in range(settings.num_hidden_layers)
        )
        self.cls = BertOnlyMLMHead(config)
        self.gradient_checkpointing = False
        self.apply(lambda module: _initialise(module, settings.initializer_range))
        # Official checkpoints hold the position numbers, those saved with recent libraries do not.
        embeddings = self.embeddings
        embeddings.register_buffer("position_ids", embeddings.position_ids, persistent=True)
        embeddings.register_load_state_dict_pre_hook(_supply_position_ids)
        self.register_load_state_dict_post_hook(_tie_again)
        self.tie()

    @property
    def embeddings(self) -> BertEmbeddings:
        return cast(BertEmbeddings, self.bert.embeddings)

    @property
    def layers(self) -> Sequence[TextLayer]:
        return cast(Sequence[TextLayer], cast(nn.Module, self.bert.encoder).layer)

    @property
    def fusion_layers(self) -> Sequence[TextLayer]:
        return self.layers[self.fusion_layer :]

    def tie(self) -> None:
        """Make the MLM decoder use the word embeddings and the head's bias (one parameter under two names each)."""
        head = self.cls.predictions
        head.decoder.weight = self.embeddings.word_embeddings.weight
        head.decoder.bias = head.bias

    def encode(self, ids: Tensor, atts: Tensor) -> Tensor:
        """Text layers: token ids and mask (1 = token, 0 = padding), both `[B, T]`, to `[B, T, D_t]`."""
        hidden = self.embeddings(ids)
        mask = text_mask(atts)
        for layer in self.layers[: self.fusion_layer]:
            hidden = self._run(layer, hidden, mask)
        return hidden

    def image_keys(self, image_embeds: Tensor) -> list[KeysValues]:
        """Keys and values of image tokens `[B, S, D_v]` for each fusion layer."""
        return [layer.crossattention.self.keys_values(image_embeds) for layer in self.fusion_layers]

    def fuse(
        self,
        text_embeds: Tensor,
        text_mask: Tensor | None,
        images: Sequence[KeysValues],
        image_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Fusion layers: each text looks at the image of its row.

        Args:
            text_embeds: `[B, T, D_t]` from `encode`.
            text_mask: of the function `text_mask`; `None` where nothing is masked.
            images: of `image_keys`, B rows.
            image_mask: of the function `image_mask`; `None` where nothing is masked.
            keep: `[B, M]` positions whose output is wanted; by default all.

        Returns:
            `[B, T, D_t]`, or `[B, M, D_t]`.
        """
        hidden = text_embeds
        last = len(images) - 1
        for number, (layer, image) in enumerate(zip(self.fusion_layers, images)):
            hidden = self._run(layer, hidden, text_mask, image, image_mask, keep if number == last else None)
        return hidden

    def _run(self, layer: TextLayer, *inputs: Tensor | KeysValues | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, *inputs, use_reentrant=False))
        return layer(*inputs)


def longest_texts(masks: Sequence[Tensor]) -> list[int]:
    """Length of the longest text of each batch `[B, T]` (1 for tokens), rounded up to a multiple of 8 but at most T.

    Waits for the device once.
    """
    ends = [(atts.amax(dim=0) * torch.arange(1, atts.shape[1] + 1, device=atts.device)).amax() for atts in masks]
    lengths = torch.stack(ends).tolist()
    return [min(atts.shape[1], max(8, -(-length // 8) * 8)) for atts, length in zip(masks, lengths)]


def text_mask(atts: Tensor) -> Tensor:
    """Mask of tokens (1) and padding (0) `[B, T]` as additive scores `[B, 1, 1, T]`."""
    return (1.0 - atts[:, None, None].float()) * TEXT_MASK


def image_mask(atts: Tensor) -> Tensor:
    """Mask of visible (1) and hidden (0) image tokens `[B, S]` as additive scores `[B, 1, 1, S]`."""
    return (1.0 - atts[:, None, None].float()) * IMAGE_MASK


def _initialise(module: nn.Module, std: float) -> None:
    """BERT's initialisation."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def _tie_again(module: nn.Module, _: object) -> None:
    # Loading with assign=True, or onto a model from the meta device, has replaced the parameters one by one.
    cast(TextEncoder, module).tie()


def _supply_position_ids(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    state_dict.setdefault(prefix + "position_ids", cast(Tensor, module.position_ids))
