"""FAFA's objectives on BLIP-2's features (paper sections 4.2 to 4.4), and the model ready for use: built, loaded, placed."""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
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
from fafa.model.blip2 import Blip2, Captions
from fafa.model.hub import parts_of
from fafa.model.settings import MODEL_NAME, ModelSettings, read_settings
from fafa.model.start_weights import load_start_weights, read_state_dict
from fafa.model.tokenizer import build_tokenizer
from fafa.model.weights import LoadResult, load_official_state_dict, official_state_dict, required_keys
from fafa.processors import BlipCaptionProcessor
from fafa.transforms import blip_image_train, inference_transform
from tbps_common.errors import CheckpointError, InputError
from tbps_common.models.hub import HubModel, HubParts
from tbps_common.models.source import HUB_CONFIG
from tbps_common.run.distributed import broadcast_tensor, gather_rows

OLDEST_TRANSFORMERS = (5, 17)

Processors = dict[str, Callable[[Any], Any]]


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
        # Settable, as in the released code.
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
            samples: `image` (references) and `target`, `[B, 3, S, S]` as `vit_states` takes them; `text_input`, B captions or
                their encoding; `query_id`, int64 `[B]`, equal for mutual positives.
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
        states = self.vit_states(torch.cat([image, target]))
        states, weights = self.folded_norm(states) if self.settings.freeze_vit else (self.ln_vision(states), None)
        references, targets = states.split(len(image))
        fused = self.fused_hidden(references, samples["text_input"], weights)
        hidden = self.image_hidden(targets, weights)
        ids = samples["query_id"]
        draws = dict(draws or {})
        if self.gather and dist.is_available() and dist.is_initialized():
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
        made = {name: broadcast_tensor(value) for name, value in made.items()}
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


class Blip2FAFACPR(FAFA, HubModel):
    """The model of the paper: a frozen EVA or CLIP ViT, the Q-Former, and FAFA's objectives.

    Args:
        settings: sizes, precision and objectives. Weights are random; `from_config` and `from_pretrained` load them.
        empty_vit: leave the ViT's weights as memory is, because a file's will take their place.

    Raises:
        InputError: the tokenizer cannot be found, or transformers is older than 5.17.
    """

    def __init__(self, settings: ModelSettings, empty_vit: bool = False):
        _require_transformers()
        # An older transformers (in LAVIS's environment) lacks what these import.
        from fafa.model.qformer import QFormer
        from fafa.model.vit import build_vit

        tokenizer = build_tokenizer(settings.tokenizer)
        qformer = QFormer(settings.qformer, len(tokenizer), settings.vit_width, settings.cross_attention_freq)
        super().__init__(settings, tokenizer, build_vit(settings, empty_vit), qformer)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Self:
        """A float32 model on the CPU from the content of a YAML file's `model:`, start weights loaded as it says.

        Raises:
            InputError: a setting is missing or wrong, or a file it names cannot be used.
        """
        return cls._started(ModelSettings.from_mapping(cfg))

    @classmethod
    def from_pretrained(cls, model_type: str | os.PathLike[str], **hub_options: Any) -> Self:
        """The same for a built-in backbone (`pretrain`, `pretrain_vitL`, `coco`) or a YAML file.

        A folder in the layout of the hub, or the name of a repository there, gives the trained model instead, in evaluation
        mode; `hub_options` are those of huggingface_hub.
        """
        name = os.fspath(model_type)
        if os.path.isdir(name) or (
            name.count("/") == 1 and not os.path.exists(name) and not name.endswith((".yaml", ".yml"))
        ):
            return super().from_pretrained(name, **hub_options)
        return cls._started(read_settings(model_type))

    def hub_parts(self) -> HubParts:
        """This model in the layout of the hub (`save_pretrained`, `push_to_hub`)."""
        values = {"fda_k": self.fda_k, "fda_alpha": self.fda_alpha, "fd_margin": self.dispersion_loss.margin}
        return parts_of(official_state_dict(self), self.settings, values, self.tokenizer.get_vocab())

    @classmethod
    def from_hub(cls, folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The model of such a folder, float32."""
        model, result = cls.from_state_dict(read_settings(folder / HUB_CONFIG).to_mapping(), state)
        if result.missing_keys or result.unexpected_keys:
            names = ", ".join([*result.missing_keys, *result.unexpected_keys][:5])
            raise CheckpointError(f"{folder} does not fit its own {HUB_CONFIG} ({names}): copy or download it again.")
        values = config.get("hyperparameters") or {}
        model.fda_k = values.get("fda_k", model.fda_k)
        model.fda_alpha = values.get("fda_alpha", model.fda_alpha)
        model.dispersion_loss.margin = values.get("fd_margin", model.dispersion_loss.margin)
        return model

    @classmethod
    def _started(cls, settings: ModelSettings) -> Self:
        # Drawing a billion random numbers takes longer than reading the file that replaces them.
        sources = (settings.vit_weights, settings.finetuned if settings.load_finetuned else settings.pretrained)
        promised = (settings.load_pretrained or settings.load_finetuned) and any(sources)
        model = cls(settings, empty_vit=promised)
        if not load_start_weights(model) and promised:
            model = cls(settings)
            load_start_weights(model)
        return model

    @classmethod
    def from_state_dict(cls, cfg: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Self, LoadResult]:
        """A model with the weights of a checkpoint; start weights are read only if the checkpoint lacks some.

        Args:
            cfg: content of a YAML file's `model:`.
            state: tensors in official layout.

        Returns:
            The model (float32, on the CPU), and missing and unexpected keys of `state`.

        Raises:
            StateDictMismatch: a tensor has the wrong shape.
        """
        settings = ModelSettings.from_mapping(cfg)
        absent = [key for key in required_keys(settings) if key not in state and not key.startswith("mlm_predictor.")]
        if any(key.startswith("visual_encoder.") for key in absent):
            model = cls._started(settings)
        else:
            model = cls(settings, empty_vit=True)
            if absent:
                load_start_weights(model)
        return model, load_official_state_dict(model, state)


def _require_transformers() -> None:
    """Package metadata cannot ask for 5.17: FAFA inside LAVIS lives with an old one."""
    wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise InputError(
            f"The model needs transformers {wanted} or later: pip install 'transformers>={wanted}'."
        ) from None
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if numbers < OLDEST_TRANSFORMERS:
        raise InputError(
            f"The model needs transformers {wanted} or later, but {found} is installed: "
            f"pip install 'transformers>={wanted}' (LAVIS needs its own environment)."
        )


def load_model_and_preprocess(
    name: str,
    model_type: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    *,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Blip2FAFACPR, Processors, Processors]:
    """Build a model with its start weights and processors.

    Args:
        name: `blip2_fafa_cpr`.
        model_type: built-in backbone or path of a YAML file.
        model_path: checkpoint (path or https URL) loaded over the start weights; keys need not agree.
        is_eval: evaluation mode; else training mode.
        device: where to put it. On a GPU a frozen ViT's matrices are stored as `vit_precision` says.
        overrides: settings in place of the configuration's; None: not given.

    Returns:
        The model, image processors and text processors; both with the keys `train` and `eval`.

    Raises:
        InputError: an unknown name, a wrong setting, a file that cannot be used.
    """
    if name != MODEL_NAME:
        raise InputError(f"--blip-model-name must be {MODEL_NAME}, but it is {name!r}.")
    settings = read_settings(model_type, **(overrides or {}))
    if model_path is None:
        model = Blip2FAFACPR.from_config(settings.to_mapping())
    else:
        model, _ = Blip2FAFACPR.from_state_dict(settings.to_mapping(), read_state_dict(model_path))
    place(model, device).train(not is_eval)
    text = BlipCaptionProcessor()
    images = {"train": blip_image_train(settings.image_size), "eval": inference_transform(settings.image_size)}
    return model, images, {"train": text, "eval": text}


def place(model: Blip2FAFACPR, device: str | torch.device) -> Blip2FAFACPR:
    """Move a model; on a GPU store a frozen ViT's matrices in its `vit_precision`, on a CPU everything in float32."""
    device = torch.device(device)
    if device.type == "cpu":
        return model.float().to(device)
    model.store_vit_in_half()
    return model.to(device)
