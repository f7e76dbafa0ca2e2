"""CMLFA: CLIP towers, latent feature alignment, fusion, and the cross-modal encoder of the MLM branch."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import LayerNormFp32, QuickGELU, Transformer
from torch import Tensor, nn

from cmlfa.model.clip import (
    HEAD_WIDTH,
    ClipGeometry,
    build_clip,
    clip_geometry,
    image_tokens,
    load_start_weights,
    text_tokens,
)
from cmlfa.model.hub import parts_of
from cmlfa.model.safl import SAFL
from cmlfa.model.settings import ModelSettings
from cmlfa.model.start_weights import read_start_weights
from cmlfa.model.weights import load_but_heads, load_checkpoint
from cmlfa.objectives import compute_cmpm, compute_id, compute_itc, compute_mlm, compute_sdm
from tbps_common.errors import InputError
from tbps_common.models.hub import HubModel, HubParts


class CMLFA(nn.Module, HubModel):
    """The network of CMLFA. Attribute names are those of the released checkpoints.

    Image feature `v = S(patch tokens) + class token`, text feature `t = S(text tokens) + end token`, where `S` is the
    mean of the slots after SAFL and the shared transformer ("shared feature fusion"). Only `v` and `t` are used for
    retrieval; they are not normalised.

    With `lfa_attention="batch"` (the released code) the shared transformer attends over the samples of the mini-batch,
    so a feature depends on the batch it was computed in, at test time too. With `"parts"` (the paper's figure) it
    attends over the slots of one sample. The parameters are the same.

    Attributes:
        unused_parameters: names that never receive a gradient.
    """

    unused_parameters = ("safl.pos_embeding",)

    def __init__(self, settings: ModelSettings, geometry: ClipGeometry, num_classes: int):
        super().__init__()
        width = geometry.embed_dim
        if width % HEAD_WIDTH:
            raise InputError(
                f"The CLIP model's joint space must be a multiple of {HEAD_WIDTH} wide, but it is {width}."
            )
        if width % settings.lfa_heads:
            raise InputError(f"--lfa_heads {settings.lfa_heads} must divide the width {width} of the joint space.")
        self.settings = settings
        self.num_classes = num_classes
        self.logit_scale = 1 / settings.temperature

        self.base_model = build_clip(geometry, settings.img_size, settings.stride_size)
        self.shared_transformer = _transformer(width, settings.lfa_layers, settings.lfa_heads)
        if settings.has_classifier:
            self.classifier = nn.Linear(width, num_classes)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)
        if settings.has_mlm:
            heads = width // HEAD_WIDTH
            self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.cross_modal_transformer = _transformer(width, settings.cmt_depth, heads)
            self.ln_pre_t = LayerNormFp32(width)
            self.ln_pre_i = LayerNormFp32(width)
            self.ln_post = LayerNormFp32(width)
            self.mlm_head = nn.Sequential(
                OrderedDict(
                    dense=nn.Linear(width, width),
                    gelu=QuickGELU(),
                    ln=LayerNormFp32(width),
                    fc=nn.Linear(width, settings.vocab_size),
                )
            )
            self._initialise_cross_modal()
        self.safl = SAFL(width, settings.num_prototypes, settings.lfa_dropout)

    def _initialise_cross_modal(self) -> None:
        scale = self.cross_attn.embed_dim**-0.5
        output_scale = scale * (2 * self.settings.cmt_depth) ** -0.5
        hidden_scale = (2 * self.cross_attn.embed_dim) ** -0.5
        deviations = {
            "in_proj_weight": scale,
            "attn.in_proj_weight": scale,
            "out_proj.weight": output_scale,
            "c_fc.weight": hidden_scale,
            "c_proj.weight": output_scale,
            "dense.weight": hidden_scale,
            "fc.weight": output_scale,
        }
        for module in (self.cross_attn, self.cross_modal_transformer, self.mlm_head):
            for name, parameter in module.named_parameters():
                deviation = deviations.get(".".join(name.split(".")[-2:]))
                if deviation is not None:
                    nn.init.normal_(parameter, std=deviation)

    def hub_parts(self) -> HubParts:
        """This model in the layout of the hub (`save_pretrained`, `push_to_hub`)."""
        return parts_of(self.state_dict(), asdict(self.settings))

    @classmethod
    def from_hub(cls, folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> "CMLFA":
        """The model of such a folder (`from_pretrained`), half precision where its settings say so."""
        geometry = clip_geometry(state, str(folder), prefix="base_model.")
        classifier = state.get("classifier.weight")
        model = build_model(config, len(classifier) if classifier is not None else 1, geometry=geometry)
        load_checkpoint(model, state)
        return model

    def image_tokens(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to all projected tokens `[B, 1 + P, D]`, the class token first."""
        return image_tokens(self.base_model, images)

    def text_tokens(self, ids: Tensor) -> Tensor:
        """Token ids `[B, L]` to all projected tokens `[B, L, D]`."""
        return text_tokens(self.base_model, ids)

    def latent(self, tokens: Tensor) -> Tensor:
        """Refined slots `[B, K, D]` of the tokens `[B, N, D]` of one modality (images: without the class token)."""
        return self._align(self.safl(tokens))

    def _align(self, slots: Tensor, modalities: int = 1) -> Tensor:
        """The shared transformer over slots `[modalities * B, K, D]`, along the axis of `lfa_attention`."""
        if self.settings.lfa_attention == "parts":
            return self.shared_transformer(slots)
        # The released code hands [B, K, D] to a transformer that takes the first axis as the sequence.
        over_batch = slots.unflatten(0, (modalities, -1)).transpose(1, 2).flatten(0, 1)  # (modalities * K, B, D)
        aligned = self.shared_transformer(over_batch)
        return aligned.unflatten(0, (modalities, -1)).transpose(1, 2).flatten(0, 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Fused image features, float32 `[B, D]`, not normalised."""
        tokens = self.image_tokens(images)
        return self.latent(tokens[:, 1:]).mean(dim=1) + tokens[:, 0].float()

    def encode_text(self, ids: Tensor) -> Tensor:
        """Fused text features of token ids `[B, L]`, float32 `[B, D]`, not normalised."""
        tokens = self.text_tokens(ids)
        return self.latent(tokens).mean(dim=1) + _end_tokens(tokens, ids).float()

    def cross_former(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Text tokens `q` `[B, L, D]` look at image tokens `k`, `v` `[B, 1 + P, D]`; no residual around the attention.

        Returns:
            `[B, L, D]`, the input of `mlm_head`.
        """
        key = self.ln_pre_i(k)
        value = key if v is k else self.ln_pre_i(v)
        attended = self.cross_attn(self.ln_pre_t(q), key, value, need_weights=False)[0]
        return self.ln_post(self.cross_modal_transformer(attended))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses and accuracies of one batch.

        Args:
            batch: `pids` `[B]`, `images` `[B, 3, H, W]`, `caption_ids` `[B, L]`; with the MLM loss also `mlm_ids` and
                `mlm_labels` `[B, L]` (0: not masked), and optionally `mlm_positions`, the indices of the labelled
                entries of the flattened `mlm_labels` (saves waiting for the device to find them).

        Returns:
            Scalars in the order of the released code: `temperature`, then of the enabled losses `itc_loss`,
            `sdm_loss`, `cmpm_loss`, `id_loss`, `img_acc`, `txt_acc`, `mlm_loss`, `mlm_acc`. The training loss is the
            sum of the entries whose name contains "loss".
        """
        losses = self.settings.losses
        images, ids, pids = batch["images"], batch["caption_ids"], batch["pids"]
        vision = self.image_tokens(images)
        text = self.text_tokens(ids)
        slots = self.safl.feed(torch.cat([self.safl.pool(vision[:, 1:]), self.safl.pool(text)]))
        shared_image, shared_text = self._align(slots, modalities=2).mean(dim=1).chunk(2)
        image_feature = shared_image + vision[:, 0].float()
        text_feature = shared_text + _end_tokens(text, ids).float()

        id_logits = mlm_scores = mlm_labels = None
        if "id" in losses:
            both = torch.cat([image_feature, text_feature])
            id_logits = self.classifier(both.to(self.classifier.weight.dtype)).float()
        if "mlm" in losses:
            mlm_ids = batch["mlm_ids"]
            # Training data usually carries the masked ids as caption ids too; then the text is encoded already.
            same = mlm_ids is ids or torch.equal(mlm_ids, ids)
            masked = text if same else self.text_tokens(mlm_ids)
            hidden = self.cross_former(masked, vision, vision).flatten(0, 1)  # (B * L, D)
            labels = batch["mlm_labels"].flatten()
            positions = batch["mlm_positions"] if "mlm_positions" in batch else labels.nonzero().flatten()
            # The loss ignores the other positions: the head, the largest product of the model, is spared there.
            mlm_scores, mlm_labels = self.mlm_head(hidden[positions]).float(), labels[positions]

        # Autocast would compute the similarity matrices in half precision.
        with torch.autocast(device_type=images.device.type, enabled=False):
            return self._losses(image_feature.float(), text_feature.float(), pids, id_logits, mlm_scores, mlm_labels)

    def _losses(
        self,
        image: Tensor,
        text: Tensor,
        pids: Tensor,
        id_logits: Tensor | None,
        mlm_scores: Tensor | None,
        mlm_labels: Tensor | None,
    ) -> dict[str, Tensor]:
        enabled = self.settings.losses
        entries = {"temperature": torch.full((), 1 / self.logit_scale, device=image.device)}
        if "itc" in enabled:
            entries["itc_loss"] = self.settings.itc_loss_weight * compute_itc(image, text, self.logit_scale)
        if "sdm" in enabled:
            entries["sdm_loss"] = compute_sdm(image, text, pids, self.logit_scale)
        if "cmpm" in enabled:
            entries["cmpm_loss"] = compute_cmpm(image, text, pids)
        if id_logits is not None:
            image_logits, text_logits = id_logits.chunk(2)
            entries["id_loss"] = self.settings.id_loss_weight * compute_id(image_logits, text_logits, pids)
            entries["img_acc"] = _accuracy(image_logits, pids)
            entries["txt_acc"] = _accuracy(text_logits, pids)
        if mlm_scores is not None and mlm_labels is not None:
            entries["mlm_loss"] = self.settings.mlm_loss_weight * compute_mlm(mlm_scores, mlm_labels)
            # Of every step, because the log shows the epoch's average, as in the released code; it reads the masked words' scores
            # once more, some 50 MB at the paper's batch.
            entries["mlm_acc"] = _accuracy(mlm_scores, mlm_labels)
        return entries


def build_model(args: Any, num_classes: int = 11003, *, geometry: ClipGeometry | None = None) -> CMLFA:
    """Build the network from flags, on the CPU, with the start weights loaded: CLIP's, or a whole CMLFA checkpoint's.

    Args:
        args: namespace or mapping of flags (see `ModelSettings`); absent ones take their defaults.
        num_classes: persons of the training split.
        geometry: sizes of the CLIP model when its weights are about to be loaded from a checkpoint: then
            `pretrain_choice` is not read at all and the towers stay randomly initialised.

    Returns:
        The network in training mode; half precision where `precision` says so ("auto": on CUDA).

    Raises:
        InputError: flags that contradict each other or the CLIP model.
        CheckpointError: the start weights cannot be found, read or fitted.
    """
    settings = ModelSettings.of(args)
    source, start = settings.pretrain_choice, None
    if geometry is None:
        start = read_start_weights(source)
        trained_before = "base_model.visual.proj" in start
        geometry = clip_geometry(start, source, prefix="base_model." if trained_before else "")
    _check_against_clip(settings, geometry)
    model = CMLFA(settings, geometry, num_classes)
    if start is not None and trained_before:
        load_but_heads(model, start, source=source)
    elif start is not None:
        load_start_weights(model.base_model, start, geometry.grid(settings.img_size, settings.stride_size), source)
    if resolve_precision(settings.precision, settings.device) == "fp16":
        to_released_half(model)
    return model


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is "fp16" (the released code) on CUDA and "fp32" on the CPU; anything else is taken as it is."""
    if precision != "auto":
        return precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "fp16" if device.startswith("cuda") else "fp32"


def to_released_half(model: CMLFA) -> None:
    """Convert in place to the mixture of the released code: products in float16, norms and tables in float32."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.half()
    model.safl.feed[0].half()
    bare = ("in_proj_weight", "in_proj_bias", "text_projection", "visual.proj", "part_tokens")
    for name, parameter in model.named_parameters():
        if name.endswith(bare):
            parameter.data = parameter.data.half()


def _check_against_clip(settings: ModelSettings, geometry: ClipGeometry) -> None:
    if settings.text_length > geometry.context_length:
        raise InputError(
            f"--text_length {settings.text_length} is longer than the {geometry.context_length} positions of the CLIP "
            f"model {settings.pretrain_choice}: give at most --text_length {geometry.context_length}."
        )
    if settings.has_mlm and settings.vocab_size != geometry.vocab_size:
        raise InputError(
            f"--vocab_size {settings.vocab_size} differs from the {geometry.vocab_size} rows of the token table of the "
            f"CLIP model {settings.pretrain_choice}: the MLM loss needs --vocab_size {geometry.vocab_size}."
        )


def _transformer(width: int, layers: int, heads: int) -> Transformer:
    return Transformer(width, layers, heads, act_layer=QuickGELU, norm_layer=LayerNormFp32, batch_first=True)


def _end_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The token of each text at its end mark, which has the largest id: `[B, L, D]` to `[B, D]`."""
    return tokens[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=1)]


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float().mean()
