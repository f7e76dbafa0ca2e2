"""FAFA's objectives on BLIP-2's features (paper sections 4.2 to 4.4): FDA, FD and MFR, and the options beside them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fafa.losses import (
    DistributionUncertainty,
    FeatureDispersionLoss,
    HardNegativeNCE,
    compute_sdm,
    contrastive_loss,
    coral_loss,
    mmd_loss,
    pool_tokens,
    token_similarity,
)
from fafa.model.backbone import Blip2, Captions
from fafa.model.gather import from_main, gather_rows, joined
from fafa.model.settings import ModelSettings
from tbps_common.errors import InputError


class FAFA(Blip2):
    """Reference and caption become one query vector, a gallery image T token vectors; see `Blip2` for the ways there.

    `forward` is the training objective. On a GPU it runs in the caller's autocast (the training loop opens it); only a ViT
    stored in half precision always runs under one of its own.

    Args:
        settings: sizes, precision and objectives.
        tokenizer: BERT's, with `[DEC]`.
        visual_encoder: the ViT.
        qformer: the Q-Former.

    Attributes:
        fda_k: tokens that count in the similarity.
        fda_alpha: soft-label strength; has an effect with `use_fda_alpha` alone.
        use_soft: mean of the best tokens; False: the best one.
        gather: compute the losses over the rows of all processes (each gives as many): N processes with b rows then do
            what one with N b rows does, if DistributedDataParallel averages the gradients.
    """

    def __init__(self, settings: ModelSettings, tokenizer: Any, visual_encoder: nn.Module, qformer: nn.Module):
        super().__init__(settings, tokenizer, visual_encoder, qformer)
        self.dispersion_loss = FeatureDispersionLoss(settings.fd_margin, settings.fd_sample_size)
        self.uncertainty = DistributionUncertainty(settings.dsu_p)
        self.hard_negatives = HardNegativeNCE()
        self.fda_k = settings.fda_k
        self.fda_alpha = 0.5
        self.use_fda_alpha = False
        self.use_soft = settings.use_soft
        self.use_sdm = settings.use_sdm
        self.use_hnnce = settings.use_hnnce
        self.use_mlm = settings.use_mlm
        self.use_mmd = settings.use_mmd
        self.use_coral = settings.use_coral
        self.use_dsu = settings.use_dsu
        self.use_dispersion = settings.use_dispersion
        self.gather = False

    def forward(self, samples: Mapping[str, Any], draws: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """All losses of a batch.

        Args:
            samples: `image` (references) and `target`, `[B, 3, S, S]`; `text_input`, B captions or their encoding;
                `query_id`, int64 `[B]`, equal for mutual positives.
            draws: numbers in place of random ones: `dsu_gate` (float), `dsu_eps_beta`, `dsu_eps_gamma` `[T, H]`,
                `fd_indices` int64 `[n]`, `mfr_mask_A`, `mfr_mask_B` `[B, H]`. Absent ones are drawn, in this order.

        Returns:
            Scalars `loss_fd`, `loss_fda`, `loss_mfr`, then `loss_mmd` and `loss_coral` where they are on.

        Raises:
            InputError: `fda_k` exceeds the number of query tokens.
        """
        self.check_fda_k()
        image, target = samples["image"].to(self.device), samples["target"].to(self.device)
        # One pass of the ViT for both: the same numbers in half as many launches.
        states = self.image_states(torch.cat([image, target]))
        references, targets = states.split(len(image))
        fused = self.fused_hidden(references, samples["text_input"])
        hidden = self.image_hidden(targets)
        ids = samples["query_id"]
        draws = dict(draws or {})
        if self.gather and joined():
            fused, hidden = gather_rows(fused), gather_rows(hidden)
            ids = gather_rows(ids.reshape(-1).to(self.device))
            draws = self._same_draws(draws, hidden)
        return self.losses(fused, hidden, ids, draws)

    def losses(self, fused: Tensor, hidden: Tensor, ids: Tensor, draws: Mapping[str, Any]) -> dict[str, Tensor]:
        """The objectives on hidden states: `fused` `[B, H]` (reference and caption), `hidden` `[B, T, H]` (target)."""
        noisy = hidden
        if self.use_dsu and self.training:
            noisy = self.uncertainty(
                hidden, draws.get("dsu_gate"), draws.get("dsu_eps_beta"), draws.get("dsu_eps_gamma")
            )
        targets, query = self._project_targets(noisy), self._project_query(fused)
        found: dict[str, Tensor] = {}
        if self.use_dispersion:
            found["loss_fd"] = self.dispersion_loss(targets, draws.get("fd_indices"))
        logits = pool_tokens(token_similarity(query, targets), self.fda_k, self.use_soft) / self.temp
        found["loss_fda"] = self._alignment(logits, ids)
        summary = hidden.mean(dim=1)
        if self.use_mlm:
            found["loss_mfr"] = self.mlm_predictor(fused, summary, draws.get("mfr_mask_A"), draws.get("mfr_mask_B"))
        if self.use_mmd:
            found["loss_mmd"] = mmd_loss(fused, summary)
        if self.use_coral:
            found["loss_coral"] = coral_loss(fused, summary)
        return found

    def _alignment(self, logits: Tensor, ids: Tensor) -> Tensor:
        if self.use_hnnce:
            return self.hard_negatives(logits)
        if self.use_sdm:
            return compute_sdm(logits, ids, factor=self.fda_alpha if self.use_fda_alpha else 1)
        return contrastive_loss(logits)

    def check_fda_k(self) -> None:
        """Raise InputError if more tokens are to be averaged than there are."""
        if self.use_soft and not 1 <= self.fda_k <= self.num_query_token:
            raise InputError(
                f"--fda-k {self.fda_k} must lie between 1 and the number of query tokens, {self.num_query_token}."
            )

    def _same_draws(self, draws: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """The first process's draws on all: every process computes the same losses."""
        count, tokens, width = hidden.shape
        made: dict[str, Any] = {}
        if self.use_dsu and self.training:
            made["dsu_gate"] = torch.tensor([np.random.random()], device=hidden.device)
            made["dsu_eps_beta"] = torch.randn(tokens, width, device=hidden.device)
            made["dsu_eps_gamma"] = torch.randn(tokens, width, device=hidden.device)
        if self.use_dispersion and count * tokens > self.dispersion_loss.sample_size:
            made["fd_indices"] = torch.randperm(count * tokens, device=hidden.device)[
                : self.dispersion_loss.sample_size
            ].contiguous()
        if self.use_mlm:
            for name in ("mfr_mask_A", "mfr_mask_B"):
                made[name] = (torch.rand(count, width, device=hidden.device) < self.mlm_predictor.mask_ratio).float()
        made = {name: from_main(value) for name, value in made.items()}
        if "dsu_gate" in made:
            made["dsu_gate"] = made["dsu_gate"].item()
        return {**made, **draws}

    @torch.no_grad()
    def inference(self, reference_embeds: Tensor, target_feats: Tensor, text: Captions) -> Tensor:
        """Similarities `[Q, G]` of references (E `[Q, N + 1, W]`) and captions with gallery tokens `[G, T, D]`."""
        self.check_fda_k()
        with self._feature_precision():
            query = self._project_query(self.fused_hidden(reference_embeds, text)).float()
        return pool_tokens(token_similarity(query, target_feats), self.fda_k, self.use_soft)
