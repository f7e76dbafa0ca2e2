"""MRA: Swin image encoder, BERT text and fusion encoder, and the losses that train them together."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.losses import contrastive_loss, draw_negatives, matching_loss, negative_weights
from mra.model.bert import KeysValues, TextEncoder, image_mask, longest_texts, text_mask
from mra.model.heads import matching_head, projection, thirds, thirds_inside
from mra.model.hub import parts_of
from mra.model.settings import ModelSettings
from mra.model.swin import VisionEncoder
from mra.model.weights import load_bert, load_official, load_swin
from tbps_common.models.hub import HubModel, HubParts
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_common.run.distributed import gather_rows

logger = logging.getLogger("mra.model")

# Weights inside the losses of the released code.
EDA_WEIGHT = 0.8
REGION_WEIGHT = 0.8

# With `lr_2` the parameters nearest to the losses learn with `lr_mult` times the rate.
_FASTER = re.compile(
    r"vision_encoder\.layers\.[23]\.|text_encoder\.bert\.encoder\.layer\.(4|5|10|11)\.|text_encoder\.cls\.|itm_head\."
)
_TIED_WEIGHT = "text_encoder.cls.predictions.decoder.weight"

Negatives = tuple[Tensor, Tensor]


class Retrieval(nn.Module, HubModel):
    """The network of MRA. Attribute names, and so the state dict, are those of the released checkpoints.

    The image encoder gives tokens, the text encoder token embeddings; projections of both are compared directly (ITC),
    and the fusion encoder, in which the text looks at the image tokens, judges a pair (ITM) and predicts masked words
    (MLM). `forward` returns the losses of a training batch.

    Args:
        config: a task's configuration (`mra.load_config`); `vision_config` and `text_config` may be paths or mappings.
        init_backbones: start from the Swin (if `load_params`) and BERT weights that the configuration names. With False
            no file is read besides the two configurations and everything is random.

    Attributes:
        config: the configuration.
        settings: what of it makes the network.
        init_params: official names of the parameters that learn with `lr_mult` times the rate.
        x_params: names of the projections.

    Raises:
        InputError: an impossible configuration, or a start file that is absent or does not fit.
    """

    def __init__(self, config: Mapping[str, Any], init_backbones: bool = True):
        super().__init__()
        settings = self.settings = ModelSettings.from_config(config)
        self.config = dict(config)
        self.temp = nn.Parameter(torch.tensor(settings.temp))
        self.vision_encoder = VisionEncoder(settings.vision)
        self.text_encoder = TextEncoder(settings.text, settings.vision.feature_width)
        self.vision_proj = projection(settings, settings.vision.feature_width, pooled=3)
        self.text_proj = projection(settings, settings.text.hidden_size, pooled=4)
        self.itm_head = matching_head(settings.text.hidden_size)
        self._one_identity: Tensor | None = None
        self._warned_about_one_identity = False
        self.set_gradient_checkpointing(settings.gradient_checkpointing)
        if init_backbones:
            if settings.load_params:
                load_swin(self.vision_encoder, settings.vision.start_weights)
            load_bert(self.text_encoder, settings.text_encoder)
        names = [name for name, _ in self.named_parameters()]
        self.init_params = _faster_names(names, settings)
        self.x_params = [name for name in names if name.startswith(("vision_proj.", "text_proj."))]

    def hub_parts(self) -> HubParts:
        """This model in the layout of the hub (`save_pretrained`, `push_to_hub`)."""
        return parts_of(self.state_dict(), self.config, self.settings.text_encoder)

    @classmethod
    def from_hub(cls, folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> "Retrieval":
        """The model of such a folder (`from_pretrained`)."""
        model = cls({**config, "text_encoder": str(folder)}, init_backbones=False)
        load_official(model, state, name=str(folder), strict=True)
        return model

    def official_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names in the released checkpoints and parameters; tied ones once, under their first name."""
        return self.named_parameters()

    def load_pretrained(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any],
        is_eval: bool = False,
        *,
        trust: bool = False,
    ) -> tuple[list[str], list[str]]:
        """Load a whole checkpoint (of MRA, or of its parent project APTM).

        Args:
            source: path of a checkpoint, or what it holds: `{"model": state, ...}` or the state itself.
            config: the configuration; relative-position tables are resampled to its `window_size`.
            is_eval: the checkpoint is of this very model: nothing is resampled, and every name must fit.
            trust: unpickle a file that holds more than plain data (it can run code; only for files of known origin).

        Returns:
            Missing and unexpected names. Unless evaluating these may be projections, which have another form for RSTPReid
            (`embed_dim` 256) than for the other data sets and then keep their random values.

        Raises:
            CheckpointError: unreadable file, or names or shapes that do not fit; the model has not changed then.
        """
        given = isinstance(source, Mapping)
        name = "the given state dict" if given else os.fspath(source)
        content = source if given else load_checkpoint_file(source, trust=trust)
        window = None if is_eval else config.get("window_size")
        missing, unexpected = load_official(self, content, name=name, window=window, strict=is_eval)
        if missing or unexpected:
            logger.warning(
                "%s has projections of another form (embed_dim %s 256): the model's own stay random and are learned from scratch",
                name,
                "not" if self.settings.linear_heads else "of",
            )
        return missing, unexpected

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of each layer in the backward pass: less memory, about a third more time."""
        self.vision_encoder.gradient_checkpointing = enabled
        self.text_encoder.gradient_checkpointing = enabled

    # Encoders (paper section 3.3)

    def get_vision_embeds(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, h, w]` to tokens `[B, 1 + L, D_v]` (their mean first) and their mask, all ones, int64."""
        embeds = self.vision_encoder(image)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def get_text_embeds(self, ids: Tensor, atts: Tensor) -> Tensor:
        """Token ids and mask `[B, T]` to embeddings `[B, T, D_t]` of the text layers."""
        return self.text_encoder.encode(ids, atts)

    def get_cross_embeds(
        self, image_embeds: Tensor, image_atts: Tensor, text_embeds: Tensor, text_atts: Tensor
    ) -> Tensor:
        """Fusion of `[B, 1 + L, D_v]` (mask `[B, 1 + L]`) and `[B, T, D_t]` (mask `[B, T]`) to `[B, T, D_t]`."""
        keys = self.text_encoder.image_keys(image_embeds)
        return self.text_encoder.fuse(text_embeds, text_mask(text_atts), keys, image_mask(image_atts))

    def get_image_feat(self, image_embeds: Tensor) -> Tensor:
        """`[B, 1 + L, D_v]` to `[B, D]`, not normalised: of the first token, or of three means over the other tokens."""
        if self.settings.linear_heads:
            return self.vision_proj(image_embeds[:, 0])
        return self.vision_proj(thirds(image_embeds[:, 1:]))

    def get_text_feat(self, text_embeds: Tensor) -> Tensor:
        """`[B, T, D_t]` to `[B, D]`, not normalised: of the first token, and of three means over the others.

        The means include padding, so T must be the length the model was trained with.
        """
        if self.settings.linear_heads:
            return self.text_proj(text_embeds[:, 0])
        return self.text_proj(torch.cat([text_embeds[:, 0], thirds(text_embeds[:, 1:])], dim=1))

    # Losses (paper section 3.3)

    def get_contrastive_loss(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> Tensor:
        """ITC of features `[B, D]` (not normalised) and identities `[B]`, over all processes."""
        return self._contrastive_losses([(image_feat, text_feat, idx)])[0]

    def itm_negative_weights(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `[B, B]` of drawing texts for each image, and images for each text; features as in the ITC."""
        return negative_weights(_unit(image_feat), _unit(text_feat), idx, self.temp)

    def get_matching_loss(
        self,
        image_embeds: Tensor,
        image_atts: Tensor,
        image_feat: Tensor,
        text_embeds: Tensor,
        text_atts: Tensor,
        text_feat: Tensor,
        idx: Tensor,
        negatives: Negatives | None = None,
    ) -> Tensor:
        """ITM of the B pairs and of one drawn negative for each text and each image.

        Args:
            image_embeds: `[B, S, D_v]`.
            image_atts: `[B, S]`, 1 where the text may look.
            image_feat: `[B, D]`, not normalised; with `text_feat` it decides which negatives are likely.
            text_embeds: `[B, T, D_t]`.
            text_atts: `[B, T]`.
            text_feat: `[B, D]`.
            idx: `[B]` identities.
            negatives: image for each text and text for each image, both `[B]` int64; drawn by default.

        Returns:
            Scalar.
        """
        keys = self.text_encoder.image_keys(image_embeds)
        if negatives is None:
            negatives = self.drawn_negatives(image_feat, text_feat, idx)
        return self.pair_matching_loss(keys, image_atts, text_embeds, text_atts, negatives)

    def get_mlm_loss(
        self,
        text_ids_masked: Tensor,
        text_atts: Tensor,
        image_embeds: Tensor,
        image_atts: Tensor,
        masked_pos: Tensor,
        masked_ids: Tensor,
    ) -> Tensor:
        """Cross-entropy of the words at `masked_pos` `[B, M]`; entries -100 of `masked_ids` `[B, M]` do not count."""
        embeds = self.get_text_embeds(text_ids_masked, text_atts)
        keys = self.text_encoder.image_keys(image_embeds)
        return self._mlm_loss(embeds, text_atts, keys, image_mask(image_atts), masked_pos, masked_ids)

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_atts: Tensor,
        text_ids_masked: Tensor | None = None,
        masked_pos: Tensor | None = None,
        masked_ids: Tensor | None = None,
        idx: Tensor | None = None,
        label: Tensor | None = None,
        text_ids_eda: Tensor | None = None,
        text_atts_eda: Tensor | None = None,
        text_ids_box: Tensor | None = None,
        text_atts_box: Tensor | None = None,
        box_atts: Tensor | None = None,
        negatives: Mapping[str, Negatives] | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The losses of a training batch of B pairs.

        Args:
            image: `[B, 3, h, w]`.
            text_ids: `[B, T]` token ids of the captions, padded to `max_tokens`.
            text_atts: `[B, T]`, 1 for tokens.
            text_ids_masked: `[B, T]` captions with masked words.
            masked_pos: `[B, M]` their positions.
            masked_ids: `[B, M]` the words, -100 for unused entries.
            idx: `[B]` identities.
            label: `[B]` identities of the phrases (region branch).
            text_ids_eda: `[B, T]` rewritten captions; absent, there is no EDA branch.
            text_atts_eda: `[B, T]`.
            text_ids_box: `[B, T]` phrases; needed if the configuration's `region` is positive.
            text_atts_box: `[B, T]`.
            box_atts: `[B, 1 + L]`: 0 for the tokens inside the box, 1 outside and for the first.
            negatives: branch (`main`, `eda`, `region`) to image for each text and text for each image, in place of draws.
            lengths: branch to the length of its longest text (`longest_texts`); absent, it is asked of the device, which is
                waited for.

        Returns:
            ITC (EDA included), ITM (EDA included), MLM, and region loss (0 if off), all scalars. The total is
            `itc + itm + mlm + config["region"] * region`.
        """
        if idx is None or text_ids_masked is None or masked_pos is None or masked_ids is None:
            raise ValueError("idx, text_ids_masked, masked_pos and masked_ids are needed for the losses")
        given = negatives or {}
        views = {"main": (text_ids, text_atts), "masked": (text_ids_masked, text_atts)}
        with_region = self.settings.region > 0
        if with_region:
            if text_ids_box is None or text_atts_box is None or box_atts is None or label is None:
                raise ValueError("the region branch needs label, text_ids_box, text_atts_box and box_atts")
            views["region"] = text_ids_box, text_atts_box
        if text_ids_eda is not None and text_atts_eda is not None:
            views["eda"] = text_ids_eda, text_atts_eda
        if lengths is None:  # before there is work to wait for
            lengths = dict(zip(views, longest_texts([atts for _, atts in views.values()])))
        image_embeds = self.vision_encoder(image)
        keys = self.text_encoder.image_keys(image_embeds)
        embeds = self._encode_together(views)

        # BatchNorm's running statistics see region, whole image and caption, and EDA, in this order.
        pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        region_keys, region_atts = keys, None
        if with_region and box_atts is not None and label is not None:
            region_feat, region_keys, region_atts = self.region_features(image_embeds, keys, box_atts)
            pairs["region"] = region_feat, self.get_text_feat(embeds["region"]), label
        image_feat = self.get_image_feat(image_embeds)
        pairs["main"] = image_feat, self.get_text_feat(embeds["main"]), idx
        if "eda" in views:
            pairs["eda"] = image_feat, self.get_text_feat(embeds["eda"]), idx

        itc = dict(zip(pairs, self._contrastive_losses(list(pairs.values()))))
        itm = {
            name: self.pair_matching_loss(
                region_keys if name == "region" else keys,
                region_atts if name == "region" else None,
                embeds[name][:, : lengths[name]],
                views[name][1][:, : lengths[name]],
                given[name] if name in given else self.drawn_negatives(*pair),
            )
            for name, pair in pairs.items()
        }
        loss_itc, loss_itm = itc["main"], itm["main"]
        if "eda" in pairs:
            loss_itc = loss_itc + EDA_WEIGHT * itc["eda"]
            loss_itm = loss_itm + EDA_WEIGHT * itm["eda"]
        loss_mlm = self._mlm_loss(embeds["masked"], text_atts, keys, None, masked_pos, masked_ids)
        if not with_region:
            return loss_itc, loss_itm, loss_mlm, torch.zeros_like(loss_mlm)
        weight = REGION_WEIGHT if self.settings.region_feat == "released" else 1.0
        return loss_itc, loss_itm, loss_mlm, weight * (itc["region"] + itm["region"])

    def _encode_together(self, views: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Text embeddings of several token batches, in one pass where their lengths agree."""
        if len({ids.shape[1] for ids, _ in views.values()}) > 1:
            return {name: self.get_text_embeds(ids, atts) for name, (ids, atts) in views.items()}
        ids, atts = (torch.cat(parts) for parts in zip(*views.values()))
        embeds = self.get_text_embeds(ids, atts).split([len(ids) for ids, _ in views.values()])
        return dict(zip(views, embeds))

    def region_features(
        self, image_embeds: Tensor, keys: list[KeysValues], box_atts: Tensor
    ) -> tuple[Tensor, list[KeysValues], Tensor]:
        """Feature of the box, and keys and mask with which a phrase looks at it.

        As released, the feature pools all tokens (with projections of pooled tokens the box does not enter it), and the
        phrase looks at the tokens inside, but not at their mean. As in the paper, the feature pools the tokens inside
        and the phrase looks at their mean, too.
        """
        inside = 1 - box_atts  # (B, 1 + L), 0 for the first token
        weights = inside.to(image_embeds.dtype)
        mean = (weights.unsqueeze(1) @ image_embeds) / weights.sum(dim=1).view(-1, 1, 1)  # (B, 1, D_v)
        if self.settings.region_feat == "released":
            # The first token is hidden, so its keys and values need not be those of the region.
            return self.get_image_feat(torch.cat([mean, image_embeds[:, 1:]], dim=1)), keys, inside
        own = self.text_encoder.image_keys(mean)
        joined = [
            KeysValues(*(torch.cat([first, rest[:, :, 1:]], dim=2) for first, rest in zip(region, whole)))
            for region, whole in zip(own, keys)
        ]
        if self.settings.linear_heads:
            feature = self.vision_proj(mean[:, 0])
        else:
            feature = self.vision_proj(thirds_inside(image_embeds[:, 1:], inside[:, 1:]))
        return feature, joined, torch.cat([torch.ones_like(inside[:, :1]), inside[:, 1:]], dim=1)

    def _contrastive_losses(self, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """ITC of several pairs of features with one exchange of features and one of identities.

        As released, the gradient reaches the features of this process only and is not summed over the processes: every one
        computes the same global loss, so with DistributedDataParallel's mean the gradient of an encoder is 1 / world of that
        of one process with the joined batch.
        """
        count, width = len(pairs), self.settings.embed_dim
        features = [_unit(feature) for image, text, _ in pairs for feature in (image, text)]
        together = gather_rows(torch.cat(features, dim=1), sum_gradients=False).unflatten(1, (2 * count, width))
        ids = gather_rows(torch.stack([ids for _, _, ids in pairs], dim=1), sum_gradients=False)
        return [
            contrastive_loss(
                together[:, 2 * number],
                together[:, 2 * number + 1],
                ids[:, number],
                self.temp,
                self.settings.label_smoothing,
            )
            for number in range(count)
        ]

    def drawn_negatives(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> Negatives:
        """An image for each text and a text for each image, of other identities where there are any."""
        texts_of_image, images_of_text = self.itm_negative_weights(image_feat, text_feat, idx)
        self._warn_about_one_identity(texts_of_image)
        return draw_negatives(images_of_text), draw_negatives(texts_of_image)

    def _warn_about_one_identity(self, weights: Tensor) -> None:
        """Say once that a batch held one identity only, so that its negatives were drawn among the same person."""
        if self._one_identity is None:
            self._one_identity = torch.zeros((), dtype=torch.bool, pin_memory=weights.is_cuda)
        if not self._warned_about_one_identity:
            # Copied without waiting: from a GPU the answer may be that of an earlier step.
            self._one_identity.copy_((weights.sum(dim=1) == 0).any(), non_blocking=True)
            if self._one_identity:
                self._warned_about_one_identity = True
                logger.warning("a batch holds one person only: the negatives of the matching loss are that person, too")

    def pair_matching_loss(
        self,
        keys: list[KeysValues],
        image_atts: Tensor | None,
        text_embeds: Tensor,
        text_atts: Tensor,
        negatives: Negatives,
    ) -> Tensor:
        """ITM from keys and values of the B images: matching pairs and both kinds of negatives as one batch of 3B.

        Only the first token's output counts, so padding behind the longest text may be cut off beforehand.
        """
        own = torch.arange(len(text_embeds), device=text_embeds.device)
        image_rows = torch.cat([own, negatives[0], own])
        text_rows = torch.cat([own, own, negatives[1]])
        first = self.text_encoder.fuse(
            text_embeds[text_rows],
            text_mask(text_atts)[text_rows],
            [image.rows(image_rows) for image in keys],
            None if image_atts is None else image_mask(image_atts)[image_rows],
            keep=torch.zeros_like(text_rows).unsqueeze(1),
        )
        return matching_loss(self.itm_head(first[:, 0]))

    def _mlm_loss(
        self,
        embeds: Tensor,
        text_atts: Tensor,
        keys: list[KeysValues],
        mask: Tensor | None,
        masked_pos: Tensor,
        masked_ids: Tensor,
    ) -> Tensor:
        words = self.text_encoder.fuse(embeds, text_mask(text_atts), keys, mask, keep=masked_pos)
        logits = self.text_encoder.cls(words)  # (B, M, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1).float(), masked_ids.flatten(), ignore_index=-100)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _faster_names(names: list[str], settings: ModelSettings) -> list[str]:
    """Official names of the parameters with `lr_mult` times the learning rate, sorted.

    With `init_cross` the cross-attention, which no start file holds; with `lr_2` the last stages and layers, the MLM and
    the ITM head. The tied decoder weight is listed as in the released code, without effect.
    """
    chosen = {name for name in names if settings.init_cross and ".crossattention." in name}
    if settings.lr_2:
        chosen |= {name for name in [*names, _TIED_WEIGHT] if _FASTER.match(name)}
    return sorted(chosen)
