"""BLIP-2 stage 1 as FAFA uses it: images and captions to hidden states and unit features (paper section 4.1).

Nothing here needs transformers: the ViT and the Q-Former are handed in. `fafa.model.fafa` takes those of transformers,
`packages/fafa/lavis` LAVIS's.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fafa.losses import MaskedFeaturePrediction
from fafa.model.settings import ModelSettings
from fafa.model.weights import Entry, layout
from fafa.transforms import normalised

Captions = Sequence[str] | Mapping[str, Tensor]
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class BlipFeatures:
    """What `extract_features` found; fields of other modes stay None.

    Attributes:
        image_embeds: `[B, T, H]` hidden states of the query tokens.
        image_embeds_proj: `[B, T, D]`, unit.
        text_embeds: `[B, L, H]` hidden states of the text.
        text_embeds_proj: `[B, L, D]`, unit.
        multimodal_embeds: `[B, D]`, unit.
    """

    image_embeds: Tensor | None = None
    image_embeds_proj: Tensor | None = None
    text_embeds: Tensor | None = None
    text_embeds_proj: Tensor | None = None
    multimodal_embeds: Tensor | None = None


class VisionNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and returned in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., W]` to `[..., W]`."""
        with torch.autocast(input.device.type, enabled=False):
            wide = input.to(torch.promote_types(input.dtype, self.weight.dtype))
            return super().forward(wide).to(input.dtype)


class Blip2(nn.Module):
    """Towers, projections and the ways through them.

    Args:
        settings: sizes and precision.
        tokenizer: BERT's, with `[DEC]`.
        visual_encoder: `[B, 3, S, S]` to `[B, N + 1, W]`.
        qformer: called with `queries`, `input_ids`, `text_mask`, `image_states`; see `fafa.model.qformer.QFormer`.

    Attributes:
        autocast_dtype: dtype of `maybe_autocast` on a GPU; None for float32.
        qformer_autocast: run the Q-Former under autocast in feature extraction too (the released code: float32).
    """

    def __init__(self, settings: ModelSettings, tokenizer: Any, visual_encoder: nn.Module, qformer: nn.Module):
        super().__init__()
        width = settings.qformer.hidden_size
        self.settings = settings
        self.tokenizer = tokenizer
        self.query_tokens = nn.Parameter(torch.empty(1, settings.num_query_token, width).normal_(std=0.02))
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.visual_encoder = visual_encoder
        self.ln_vision = VisionNorm(settings.vit_width, eps=1e-5)
        self.Qformer = qformer
        self.vision_proj = nn.Linear(width, settings.embed_dim)
        self.text_proj = nn.Linear(width, settings.embed_dim)
        self.itm_head = nn.Linear(width, 2)
        if settings.use_mlm:
            self.mlm_predictor = MaskedFeaturePrediction(width, settings.mfr_mask_ratio, settings.mfr_hidden_dim)
        self.num_query_token = settings.num_query_token
        self.max_txt_len = settings.max_txt_len
        self.autocast_dtype: torch.dtype | None = torch.float16
        self.qformer_autocast = False
        if settings.freeze_vit:
            self.visual_encoder.requires_grad_(False).eval()

    def entries(self) -> tuple[Entry, ...]:
        """The official state dict's entries beside the names of this model's parameters."""
        return layout(self.settings)

    @property
    def unused_parameters(self) -> list[str]:
        """Names of the parameters that no loss uses: the word-prediction head and the matching head."""
        heads = ("Qformer.lm_head.", "itm_head.")
        return [name for name, _ in self.named_parameters() if name.startswith(heads)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.query_tokens.device

    def train(self, mode: bool = True) -> "Self":
        """Training mode; a frozen ViT stays in evaluation mode."""
        super().train(mode)
        if self.settings.freeze_vit:
            self.visual_encoder.eval()
        return self

    def compile_vit(self, **options: Any) -> None:
        """Compile the ViT in place with `torch.compile` (names of parameters stay); takes effect at its next call."""
        self.visual_encoder.compile(**options)

    def store_vit_in_half(self) -> None:
        """Cast a frozen ViT's matrices to its `vit_precision`; nothing for `fp32` or a trained ViT.

        Cast are weight and bias of every linear and convolution layer of the ViT that the released checkpoints hold in
        half precision; CLIP's input projections of the attention, packed there, are not.
        """
        dtype = _HALF.get(self.settings.vit_precision) if self.settings.freeze_vit else None
        if dtype is None:
            return
        for name, module in self.visual_encoder.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith(("q_proj", "k_proj", "v_proj")):
                module.weight.data = module.weight.data.to(dtype)
                if module.bias is not None:
                    module.bias.data = module.bias.data.to(dtype)

    def _vit_dtype(self) -> torch.dtype:
        return next(module.weight.dtype for module in self.visual_encoder.modules() if isinstance(module, nn.Conv2d))

    def maybe_autocast(self, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """Autocast on a GPU, in `autocast_dtype` unless another is given; nothing on a CPU."""
        dtype = dtype or self.autocast_dtype
        if self.device.type == "cpu" or dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def vit_states(self, image: Tensor) -> Tensor:
        """Tokens of the ViT before `ln_vision`, `[B, N + 1, W]`: constant for an image when the ViT is frozen.

        No gradient is recorded for a frozen ViT. A half-precision ViT runs under autocast of its dtype.

        Args:
            image: `[B, 3, S, S]`, normalised, or uint8 as `Pipeline.pixels` gives it.
        """
        size = self.settings.image_size
        if image.dim() != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise ValueError(f"Images must be [B, 3, {size}, {size}] (image_size), got {[*image.shape]}.")
        image = image.to(self.device)
        if image.dtype == torch.uint8:
            image = normalised(image)
        dtype = self._vit_dtype()
        # Stored in half precision (`place`), the matrices meet a float32 residual stream: autocast joins them.
        precision = torch.autocast(self.device.type, dtype=dtype) if dtype in _HALF.values() else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.freeze_vit), precision:
            return self.visual_encoder(image)

    def image_states(self, image: Tensor) -> Tensor:
        """`ln_vision(ViT(image))` (E), `[B, N + 1, W]`."""
        return self.ln_vision(self.vit_states(image))

    def tokenize(self, captions: Captions) -> Mapping[str, Tensor]:
        """Token ids and mask on the model's device, cut to `max_txt_len`; encodings pass through.

        Padded to the longest caption, up to a multiple of 8: nothing looks at padding, so more of it changes no feature.
        """
        if isinstance(captions, Mapping):
            encoded: Mapping[str, Tensor] = captions
        else:
            length = self.max_txt_len
            encoded = self.tokenizer(
                list(captions),
                padding="longest",
                truncation=True,
                max_length=length,
                return_tensors="pt",
                pad_to_multiple_of=None if length % 8 else 8,
            )
        return {name: encoded[name].to(self.device, non_blocking=True) for name in ("input_ids", "attention_mask")}

    def _queries(self, count: int) -> Tensor:
        return self.query_tokens.expand(count, -1, -1)

    def folded_norm(self, vit_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`ln_vision` without its scale and shift, and Q-Former weights that bring them in again.

        Keys and values are `K (g n + b) + c = (K g) n + (K b + c)`. Where the ViT is frozen, `n` is a constant: no gradient
        has to go back through the image's tokens, and autocast casts them once for all layers.

        Args:
            vit_states: of a frozen ViT, `[B, N + 1, W]`.

        Returns:
            `n`, `[B, N + 1, W]`, without gradient, and weight and bias of the cross-attentions' keys and values by name: for
            `image_hidden` and `fused_hidden`.
        """
        norm, kind = self.ln_vision, vit_states.device.type
        with torch.autocast(kind, enabled=False):
            wide = vit_states.to(torch.promote_types(vit_states.dtype, norm.weight.dtype))
            bare = F.layer_norm(wide, norm.normalized_shape, eps=norm.eps).detach()
            weights = {}
            for name, module in self.Qformer.named_modules():
                if isinstance(module, nn.Linear) and "crossattention" in name and name.endswith(("key", "value")):
                    weights[f"{name}.weight"] = module.weight * norm.weight
                    weights[f"{name}.bias"] = F.linear(norm.bias, module.weight, module.bias)
        if torch.is_autocast_enabled(kind):
            bare = bare.to(torch.get_autocast_dtype(kind))
        return bare, weights

    def image_hidden(self, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states of the query tokens that look at E: `[B, N + 1, W]` to `[B, T, H]`.

        Args:
            states: E, or with `weights` what `folded_norm` returns.
            weights: of the Q-Former, by name, in place of its own.
        """
        # The size as `shape[0]`, not `len`: an exported model takes batches of every size.
        return self._look({"queries": self._queries(states.shape[0]), "image_states": states}, weights)

    def _look(self, inputs: dict[str, Tensor], weights: Mapping[str, Tensor] | None) -> Tensor:
        return functional_call(self.Qformer, dict(weights), (), inputs) if weights else self.Qformer(**inputs)

    def fused_hidden(self, states: Tensor, captions: Captions, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Text `[CLS]` of the Q-Former on [queries, caption] with E: `[B, H]`; `weights` as for `image_hidden`."""
        tokens = self.tokenize(captions)
        inputs = {
            "queries": self._queries(states.shape[0]),
            "input_ids": tokens["input_ids"],
            "text_mask": tokens["attention_mask"],
            "image_states": states,
        }
        return self._look(inputs, weights)[:, self.num_query_token]

    def _project_targets(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(hidden), dim=-1)

    def _project_query(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.text_proj(hidden), dim=-1)

    def _feature_precision(self) -> AbstractContextManager[Any]:
        """Of the Q-Former in feature extraction: float32, as the released code, unless `qformer_autocast`."""
        if self.qformer_autocast or self.device.type == "cpu":
            return self.maybe_autocast()
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def _features_from(self, states: Tensor) -> Tensor:
        """E in float32 from ViT states."""
        return self.ln_vision(states.to(self.device)).float()

    @torch.no_grad()
    def evaluation_states(self, image: Tensor) -> Tensor:
        """`vit_states` in the precision of feature extraction: under `maybe_autocast`, without gradient."""
        with self.maybe_autocast():
            return self.vit_states(image)

    @torch.no_grad()
    def target_features(self, states: Tensor) -> Tensor:
        """Unit gallery tokens `[B, T, D]`, float32, from `vit_states`."""
        return self._target_features(self._features_from(states))[1]

    def _target_features(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        with self._feature_precision():
            hidden = self.image_hidden(embeds)
            return hidden, self._project_targets(hidden).float()

    @torch.no_grad()
    def query_features(self, states: Tensor, captions: Captions) -> Tensor:
        """Unit query vectors `[B, D]`, float32, from `vit_states` of the references and cleaned captions."""
        embeds = self._features_from(states)
        with self._feature_precision():
            return self._project_query(self.fused_hidden(embeds, captions)).float()

    @torch.no_grad()
    def extract_target_features(self, image: Tensor, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """Gallery tokens `[B, T, D]` and E `[B, N + 1, W]`, float32; `mode` has no effect."""
        embeds = self._features_from(self.evaluation_states(image))
        return self._target_features(embeds)[1], embeds

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipFeatures:
        """Features of one kind.

        Args:
            samples: `image` `[B, 3, S, S]` and `text_input`, cleaned captions, as the mode needs them.
            mode: `multimodal`, `image` or `text`.
        """
        if mode == "image":
            hidden, projected = self._target_features(self._features_from(self.evaluation_states(samples["image"])))
            return BlipFeatures(image_embeds=hidden, image_embeds_proj=projected)
        if mode == "text":
            tokens = self.tokenizer(
                list(samples["text_input"]),
                padding="longest",
                truncation=True,
                max_length=self.settings.qformer.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            with self._feature_precision():
                hidden = self.Qformer(input_ids=tokens["input_ids"], text_mask=tokens["attention_mask"])
                return BlipFeatures(text_embeds=hidden, text_embeds_proj=self._project_query(hidden).float())
        if mode == "multimodal":
            states = self.evaluation_states(samples["image"])
            return BlipFeatures(multimodal_embeds=self.query_features(states, samples["text_input"]))
        raise ValueError(f"mode must be 'multimodal', 'image' or 'text', got {mode!r}.")

    def forward_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, T, H]` and E, with gradient."""
        embeds = self.image_states(image)
        return self.image_hidden(embeds), embeds

    def forward_text(self, text_tokens: Mapping[str, Tensor] | Any) -> Tensor:
        """`[CLS]` of the text alone, `[B, H]`; takes an encoding with `input_ids` and `attention_mask`."""
        tokens = self.tokenize(text_tokens)
        return self.Qformer(input_ids=tokens["input_ids"], text_mask=tokens["attention_mask"])[:, 0]

    def forward_query(self, image: Tensor, text: Captions) -> Tensor:
        """Unit query vectors `[B, D]`, with gradient."""
        return self._project_query(self.fused_hidden(self.image_states(image), text))

    def compute_itm(self, image_inputs: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        """Matching score `[B]` of E `[B, N + 1, W]` with encoded text: mean over the query tokens of the second logit."""
        hidden = self.Qformer(
            queries=self._queries(image_inputs.shape[0]),
            input_ids=text_ids,
            text_mask=text_atts,
            image_states=image_inputs,
        )
        return self.itm_head(hidden[:, : self.num_query_token])[..., 1].mean(dim=1)
