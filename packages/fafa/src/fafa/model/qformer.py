"""The Q-Former: query tokens and text through one BERT-like encoder, the queries looking at the image."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from fafa.model.settings import QFormerSettings


class LanguageModelHead(nn.Module):
    """BERT's word-prediction head. FAFA never calls it; it exists because checkpoints hold it.

    Its output matrix is the word embedding itself and therefore not a parameter of its own.
    """

    def __init__(self, vocab_size: int, settings: QFormerSettings):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        dense = nn.Linear(settings.hidden_size, settings.hidden_size)
        nn.init.normal_(dense.weight, std=settings.initializer_range)
        nn.init.zeros_(dense.bias)
        norm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})


class QFormer(nn.Module):
    """BERT encoder with cross-attention to the image and a second feed-forward block for query tokens.

    Args:
        settings: its sizes.
        vocab_size: rows of the word embedding.
        image_width: width of the image states.
        cross_attention_freq: every how many layers the queries attend to the image.
    """

    def __init__(self, settings: QFormerSettings, vocab_size: int, image_width: int, cross_attention_freq: int):
        super().__init__()
        width, std = settings.hidden_size, settings.initializer_range
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(settings.max_position_embeddings, width)
        nn.init.normal_(self.word_embeddings.weight, std=std)
        nn.init.normal_(self.position_embeddings.weight, std=std)
        sizes: dict[str, Any] = dict(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.intermediate_size,
            hidden_dropout_prob=settings.hidden_dropout_prob,
            attention_probs_dropout_prob=settings.attention_probs_dropout_prob,
            max_position_embeddings=settings.max_position_embeddings,
            initializer_range=std,
            layer_norm_eps=settings.layer_norm_eps,
            cross_attention_frequency=cross_attention_freq,
            encoder_hidden_size=image_width,
            use_qformer_text_input=True,
            attn_implementation="sdpa",
        )
        self.model: Any = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
        self.lm_head = LanguageModelHead(vocab_size, settings)
        self.copy_text_to_query()

    @torch.no_grad()
    def copy_text_to_query(self) -> None:
        """Start the feed-forward blocks of the query tokens as copies of those of the text."""
        for layer in self.model.encoder.layer:
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """`[B, L]` token ids to `[B, L, H]`; positions count from the first text token."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)

    def forward(
        self,
        queries: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_states: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of [queries, text].

        Args:
            queries: `[B, T, H]`; needs `image_states`.
            input_ids: `[B, L]`.
            text_mask: `[B, L]`, 0 for padding; queries are always visible.
            image_states: `[B, N, W]`, all visible.

        Returns:
            `[B, T + L, H]`.
        """
        parts = [] if queries is None else [queries]
        visible = None
        if input_ids is not None:
            parts.append(self.embed_text(input_ids))
            if text_mask is not None:
                ones = text_mask.new_ones(text_mask.shape[0], 0 if queries is None else queries.shape[1])
                # Given ready-made as [B, 1, 1, keys], the library need not look whether anything is padded, for which
                # a GPU would have to be waited for.
                visible = torch.cat([ones, text_mask], dim=1).bool()[:, None, None, :]
        return self.model(
            query_embeds=parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),
            query_length=0 if queries is None else queries.shape[1],
            attention_mask=visible,
            encoder_hidden_states=image_states,
        ).last_hidden_state
