"""DiaNA: two towers, a shared attribute refiner, and losses over all processes."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from diana.losses import build_targets, compute_itc, compute_sdm, gather_rows
from diana.model import weights
from diana.model.config import DiaNAConfig
from diana.model.folders import resolve_folder
from diana.model.refiner import AttributeRefiner
from diana.model.towers import (
    AdaptedLlama,
    build_llama,
    build_vision,
    choose_attention,
    round_rotary,
    set_checkpointing,
)
from diana.similarity import attribute_similarity
from diana.tokenizer import check_vocabulary, load_tokenizer
from tbps_common.errors import CheckpointError, InputError

MAX_LOGIT_SCALE = math.log(100)
PROJECTION_DEVIATION = 0.02
DTYPES = {"checkpoint": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""What `--dtype` of the commands means to `load_diana`."""


@dataclass
class DiaNAOutput(ModelOutput):
    """Scalars of one training step.

    Attributes:
        loss: the sum of the others that are there.
        loss_itc: contrastive loss of the global features, mean of both directions.
        loss_sdm: similarity-distribution matching of the global features; None unless `enable_sdm`.
        loss_refine: the same on attribute similarities (with SDM if the refiner's `enable_sdm`); None without refiner.
        logit_scale: inverse temperature t, at most 100.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_sdm: Tensor | None = None
    loss_refine: Tensor | None = None
    logit_scale: Tensor | None = None


class DiaNAModel(nn.Module):
    """The network of DiaNA, randomly initialised, on the CPU in float32. Attribute names are those of the checkpoints.

    The image feature is the mean of SwinV2's tokens, the dialogue feature Llama's state at the last real token; each is
    projected to D. The refiner reads the projected tokens of either side and gives K attributes.

    Args:
        config: sizes and switches; backbone paths in it are never read.
        empty_llama: leave Llama's parameters uninitialised because they are about to be loaded.
        adapters: put on the LoRA adapters that the configuration asks for.

    Raises:
        InputError: settings that contradict each other.
    """

    def __init__(self, config: DiaNAConfig, *, empty_llama: bool = False, adapters: bool = True) -> None:
        super().__init__()
        self.config = config
        width, refiner = config.embed_dim, config.refiner_config
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.vision_model = build_vision(config.vision_config)
        self.llama: LlamaModel | AdaptedLlama = build_llama(config.llama_config, empty=empty_llama)
        self.vision_projection = nn.Linear(self.vision_model.num_features, width)
        self.text_projection = nn.Linear(self.llama.config.hidden_size, width)
        for projection in (self.vision_projection, self.text_projection):
            nn.init.trunc_normal_(projection.weight, std=PROJECTION_DEVIATION)
            nn.init.zeros_(projection.bias)
        self.refiner: AttributeRefiner | None = None
        if config.enable_refiner:
            self.refiner = AttributeRefiner(width, refiner["num_query"], refiner["num_hidden_layers"])
        if config.use_llama_lora and adapters:
            self.llama = AdaptedLlama(self.llama, config.use_llama_lora)
        self._restore_rotary()
        self.attention = "sdpa"
        self.set_attention("eager" if config.attn_implementation == "eager" else "sdpa")

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_projection.weight.dtype

    @property
    def llama_tower(self) -> LlamaModel:
        """The Llama model, with or without adapters around it."""
        return self.llama.tower if isinstance(self.llama, AdaptedLlama) else self.llama

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, H, W]` to features `[B, D]` (not normalised) and projected tokens `[B, P, D]`."""
        output = self.vision_model(pixel_values.to(self.device, self.dtype, non_blocking=True))
        return self.vision_projection(output.pooler_output), self.vision_projection(output.last_hidden_state)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, *, padding_outputs: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Dialogues to features `[B, D]` (not normalised) and projected tokens `[B, L, D]`.

        Args:
            input_ids: `[B, L]`, padded on the right.
            attention_mask: `[B, L]`, 1 for real tokens.
            padding_outputs: give the tokens at padding positions the values of the released code. Nobody looks at them,
                and since attention is causal they cannot change the real tokens before them: with False the mask is not
                handed to Llama, whose attention then runs in a quicker kernel; real tokens come out the same.
        """
        input_ids = input_ids.to(self.device, non_blocking=True)
        attention_mask = attention_mask.to(self.device, non_blocking=True)
        states = self.llama(
            input_ids=input_ids, attention_mask=attention_mask if padding_outputs else None, use_cache=False
        ).last_hidden_state  # (B, L, hidden)
        last = attention_mask.sum(dim=1) - 1
        rows = torch.arange(len(states), device=states.device)
        return self.text_projection(states[rows, last]), self.text_projection(states)

    def encode_tokens(
        self, input_ids: Tensor, position_ids: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Projected tokens `[B, L, D]`, also under a mask of one's own (which flash-attention does not take).

        Args:
            input_ids: `[B, L]`.
            position_ids: `[B, L]`; 0 to L - 1 if None.
            visible: boolean `[B, 1, L, L]`, True where the token of a row sees the token of a column; None where each
                sees those up to itself.
        """
        mask = None if visible is None else visible.to(self.device)
        if mask is not None and self.attention == "eager":  # it adds the mask to the scores
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        states = self.llama(
            input_ids=input_ids.to(self.device),
            attention_mask=mask,
            position_ids=None if position_ids is None else position_ids.to(self.device),
            use_cache=False,
        ).last_hidden_state
        return self.text_projection(states)

    def refine(self, dense: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attributes `[B, K, D]` of projected tokens `[B, N, D]`; `attention_mask` `[B, N]` is 0 for padding.

        Raises:
            InputError: the model has no refiner.
        """
        if self.refiner is None:
            raise InputError(
                "This model has no attribute refiner (enable_refiner is off): only --mode global is possible."
            )
        if attention_mask is not None:
            attention_mask = attention_mask.to(dense.device)
        return self.refiner(dense, attention_mask)

    def refine_sim(self, a: Tensor, b: Tensor) -> Tensor:
        """Attribute similarity `[N, M]` of `[N, K, D]` and `[M, K, D]`, of the configured `sim_type`."""
        return attribute_similarity(a, b, self.config.refiner_config["sim_type"])

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor
    ) -> DiaNAOutput:
        """Losses of one batch; with a process group, against the rows of all processes.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: `[B, L]`, padded on the right.
            attention_mask: `[B, L]`.
            image_ids: `[B]` or `[B, 1]` identities. Every process must bring equally many rows.
        """
        image, image_tokens = self.encode_image(pixel_values)
        text, text_tokens = self.encode_text(input_ids, attention_mask, padding_outputs=False)
        image_attributes = text_attributes = None
        if self.refiner is not None:
            image_attributes = self.refine(image_tokens)
            text_attributes = self.refine(text_tokens, attention_mask)
        # Autocast would compute the similarity matrices in half precision.
        with torch.autocast(device_type=self.device.type, enabled=False):
            return self._losses(image, text, image_attributes, text_attributes, image_ids.to(self.device))

    def _losses(
        self,
        image: Tensor,
        text: Tensor,
        image_attributes: Tensor | None,
        text_attributes: Tensor | None,
        ids: Tensor,
    ) -> DiaNAOutput:
        config = self.config
        ids = ids.reshape(-1)
        targets = build_targets(ids, gather_rows(ids))
        scale = _at_least_single(self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp())
        image, text = _unit(_at_least_single(image)), _unit(_at_least_single(text))
        directions = scale * text @ gather_rows(image).t(), scale * image @ gather_rows(text).t()
        loss_itc = _both(compute_itc, directions, targets)
        loss_sdm = _both(compute_sdm, directions, targets) if config.enable_sdm else None
        loss_refine = None
        if image_attributes is not None and text_attributes is not None:
            a, b = _at_least_single(image_attributes), _at_least_single(text_attributes)
            directions = scale * self.refine_sim(b, gather_rows(a)), scale * self.refine_sim(a, gather_rows(b))
            loss_refine = _both(compute_itc, directions, targets)
            if config.refiner_config["enable_sdm"]:
                loss_refine = loss_refine + _both(compute_sdm, directions, targets)
        loss = loss_itc
        for extra in (loss_sdm, loss_refine):
            loss = loss if extra is None else loss + extra
        return DiaNAOutput(loss, loss_itc, loss_sdm, loss_refine, scale)

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute the towers' activations in the backward pass instead of keeping them."""
        set_checkpointing(self.vision_model, on)
        set_checkpointing(self.llama_tower, on)

    def set_attention(self, requested: str = "auto", dtype: torch.dtype | None = None) -> str:
        """Choose Llama's attention kernel; call it after the model was moved.

        Args:
            requested: see `towers.choose_attention`.
            dtype: what it computes in, if autocast makes that differ from the weights' dtype.

        Returns:
            The implementation chosen.

        Raises:
            InputError: it is unknown or cannot run here.
        """
        chosen = choose_attention(requested, self.device, dtype or self.dtype)
        self.llama_tower.set_attn_implementation(chosen)
        self.attention = chosen
        return chosen

    def add_llama_lora(self, rank: int) -> None:
        """Freeze Llama and put LoRA adapters on its projections.

        Raises:
            InputError: there are adapters already, or the rank is below 1.
        """
        if isinstance(self.llama, AdaptedLlama):
            raise InputError(
                f"The model already has LoRA adapters of rank {self.config.use_llama_lora}: leave --use_llama_lora out."
            )
        if rank < 1:
            raise InputError(f"--use_llama_lora must be at least 1, but it is {rank}.")
        device, dtype = self.device, self.dtype
        self.llama = AdaptedLlama(self.llama, rank).to(device=device)
        for name, parameter in self.llama.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        self.config.use_llama_lora = rank

    def merge_lora(self) -> None:
        """Add the adapters to the weights they adapt and take them off; nothing happens without adapters."""
        if isinstance(self.llama, AdaptedLlama):
            self.llama = self.llama.merge()
            self.config.use_llama_lora = 0

    def _restore_rotary(self) -> None:
        round_rotary(self.llama_tower, getattr(torch, self.config.rotary_dtype.removeprefix("torch.")))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], config: DiaNAConfig | None = None, dtype: torch.dtype | None = None
    ) -> "DiaNAModel":
        """Load a checkpoint folder (or hub repository) strictly; backbone paths in its config.json are not needed.

        A query token that is absent or of another shape (other `num_query`), or a whole refiner that the file lacks, is
        initialised anew with a warning.

        Args:
            source: see `resolve_folder`.
            config: in place of the folder's own (its `use_llama_lora` may add adapters to a plain checkpoint).
            dtype: of the parameters; by default the configuration's, else that of the file.

        Returns:
            The model in evaluation mode on the CPU, LoRA adapters kept.

        Raises:
            CheckpointError: files are missing or damaged, or names or shapes do not fit.
        """
        folder = resolve_folder(source)
        own = DiaNAConfig.from_pretrained(folder)
        config = own if config is None else config
        state = weights.read_state(folder)
        adapted = any(".lora_A." in name for name in state)
        if adapted and not config.use_llama_lora:
            raise CheckpointError(
                f"{folder} holds LoRA adapters, but its configuration says use_llama_lora 0: give the rank "
                f"({own.use_llama_lora or 'of the adapters'})."
            )
        model = cls(config, empty_llama=True, adapters=adapted)
        model.to(dtype or config.checkpoint_dtype or weights.floating_dtype(state))
        weights.load_state(model, state, source=str(folder))
        if config.use_llama_lora and not adapted:
            model.add_llama_lora(config.use_llama_lora)
        model._restore_rotary()
        return model.eval()

    @classmethod
    def from_backbones(
        cls, config: DiaNAConfig, vision_pretrained: str | os.PathLike[str], llama_pretrained: str | os.PathLike[str]
    ) -> "DiaNAModel":
        """A new model on the towers of two backbone folders (or hub repositories), float32, in training mode.

        Raises:
            CheckpointError: a backbone is missing, or does not fit the sizes of `config`.
        """
        # Both are looked for before the model is built, which takes seconds.
        vision, llama = (resolve_folder(source) for source in (vision_pretrained, llama_pretrained))
        model = cls(config, empty_llama=True, adapters=False)
        weights.load_backbone(model.vision_model, vision, "swinv2.", ("classifier.",))
        weights.load_backbone(model.llama_tower, llama, "model.", ("lm_head.",))
        if config.use_llama_lora:
            model.add_llama_lora(config.use_llama_lora)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        state_dict: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write `model.safetensors` and `config.json` in the released layout, each whole or not at all.

        Args:
            folder: is created.
            state_dict: in place of the model's own (a sharded optimizer gathers it).
            dtype: of the saved parameters; by default as they are.
        """
        weights.save(self.config, state_dict or self.state_dict(), self._tower_settings(), Path(folder), dtype)

    def _tower_settings(self) -> dict[str, dict]:
        return {"vision_config": self.vision_model.config.to_dict(), "llama_config": self.llama_tower.config.to_dict()}


def load_diana(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[DiaNAModel, PreTrainedTokenizerBase]:
    """A checkpoint ready for retrieval: adapters merged, evaluation mode, on `device`, and its tokenizer.

    Args:
        source: checkpoint folder or hub repository.
        device: where to compute.
        dtype: of the parameters; by default the checkpoint's.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
    """
    folder = resolve_folder(source)
    tokenizer = load_tokenizer(folder)
    model = DiaNAModel.from_pretrained(folder, dtype=dtype)
    check_vocabulary(tokenizer, model.llama_tower.config.vocab_size, folder)
    model.merge_lora()
    model.to(device)
    model.set_attention(model.config.attn_implementation)
    return model, tokenizer


def _unit(features: Tensor) -> Tensor:
    # Plain division as in the released code: a zero vector gives NaN, which stops training, instead of matching nothing.
    return features / features.norm(dim=1, keepdim=True)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _both(loss: Callable[[Tensor, Tensor], Tensor], directions: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return (loss(directions[0], targets) + loss(directions[1], targets)) / 2
