"""FAFA on LAVIS's ViT, Q-Former and processors, registered there as `blip2_fafa_cpr`; `import fafa.lavis_plugin` loads it.

```python
import fafa.lavis_plugin
from lavis.models import load_model_and_preprocess

model, vis_processors, txt_processors = load_model_and_preprocess("blip2_fafa_cpr", "pretrain", is_eval=True)
```

The objectives and the feature paths are those of the package `fafa`.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lavis.common.registry import registry  # pyright: ignore[reportMissingImports]
from lavis.models.blip2_models.blip2 import Blip2Base  # pyright: ignore[reportMissingImports]
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel  # pyright: ignore[reportMissingImports]
from lavis.models.clip_vit import VisionTransformer as ClipViT  # pyright: ignore[reportMissingImports]
from lavis.models.eva_vit import VisionTransformer as EvaViT  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from fafa.model.fafa import FAFA
from fafa.model.settings import BACKBONES, ModelSettings, read_settings
from fafa.model.start_weights import load_checkpoint, load_start_weights
from fafa.model.tokenizer import build_tokenizer
from fafa.model.weights import Entry, LoadResult

NAME = "blip2_fafa_cpr"


class LavisQFormer(BertLMHeadModel):
    """LAVIS's Q-Former behind the signature that `fafa.model.blip2.Blip2` calls."""

    def forward(
        self,
        queries: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_states: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of [queries, text], `[B, T + L, H]`."""
        mask = text_mask
        if queries is not None and text_mask is not None:
            mask = text_mask.new_ones(len(text_mask), queries.shape[1] + text_mask.shape[1])
            mask[:, queries.shape[1] :] = text_mask
        image_mask = None if image_states is None else image_states.new_ones(image_states.shape[:2]).long()
        return self.bert(
            input_ids,
            query_embeds=queries,
            attention_mask=mask,
            encoder_hidden_states=image_states,
            encoder_attention_mask=image_mask,
            return_dict=True,
        ).last_hidden_state


def _build_vit(settings: ModelSettings) -> nn.Module:
    if settings.vit_model == "clip_L":
        return ClipViT(
            settings.image_size,
            settings.patch_size,
            settings.vit_width,
            settings.vit_depth + 1,  # LAVIS leaves the last block out by itself
            settings.vit_heads,
            settings.use_grad_checkpoint,
        )
    return EvaViT(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        use_mean_pooling=False,
        embed_dim=settings.vit_width,
        depth=settings.vit_depth,
        num_heads=settings.vit_heads,
        mlp_ratio=settings.vit_mlp_ratio,
        qkv_bias=True,
        drop_path_rate=settings.drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_checkpoint=settings.use_grad_checkpoint,
    )


def _build_qformer(settings: ModelSettings, vocab_size: int) -> LavisQFormer:
    sizes = settings.qformer
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.max_position_embeddings,
        hidden_dropout_prob=sizes.hidden_dropout_prob,
        attention_probs_dropout_prob=sizes.attention_probs_dropout_prob,
        layer_norm_eps=sizes.layer_norm_eps,
        initializer_range=sizes.initializer_range,
    )
    config.encoder_width = settings.vit_width
    config.add_cross_attention = True
    config.cross_attention_freq = settings.cross_attention_freq
    config.query_length = settings.num_query_token
    return LavisQFormer(config)


def _bert_tokenizer(vocabulary: Path) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer(vocab_file=str(vocabulary))


_FOLDER = Path(tempfile.mkdtemp(prefix="fafa-lavis-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def _write_config(model_type: str | os.PathLike[str], name: str) -> str:
    """A file as LAVIS reads it: all settings, absolute paths, and the processors."""
    settings = read_settings(model_type)
    size = settings.image_size
    preprocess = {
        "vis_processor": {
            "train": {"name": "blip_image_train", "image_size": size},
            "eval": {"name": "blip_image_eval", "image_size": size},
        },
        "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
    }
    path = _FOLDER / f"{name}.yaml"
    content = {"model": settings.to_mapping(), "preprocess": preprocess}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


@registry.register_model(NAME)
class LavisFAFACPR(FAFA, Blip2Base):
    """FAFA on LAVIS's ViT and Q-Former. Its parameters have the official names already.

    Args:
        settings: sizes, precision and objectives. Weights are random; `from_config` loads them.
    """

    # LAVIS joins these to its own folder; absolute paths survive that.
    PRETRAINED_MODEL_CONFIG_DICT = {name: _write_config(name, name) for name in BACKBONES}

    def __init__(self, settings: ModelSettings):
        tokenizer = build_tokenizer(settings.tokenizer, from_file=_bert_tokenizer)
        super().__init__(settings, tokenizer, _build_vit(settings), _build_qformer(settings, len(tokenizer)))

    def entries(self) -> tuple[Entry, ...]:
        """The official state dict's entries; every parameter has its official name."""
        return tuple(
            Entry(entry.official, (entry.twin or entry.official,) if entry.own else (), entry.twin)
            for entry in super().entries()
        )

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """A built-in backbone's file, or a completed copy of the YAML file that `model_type` names."""
        if model_type in cls.PRETRAINED_MODEL_CONFIG_DICT:
            return cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]
        return _write_config(model_type, f"own-{abs(hash(os.path.abspath(model_type)))}")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> "LavisFAFACPR":
        """A model from the content of a YAML file's `model:`, start weights loaded as it says.

        As LAVIS does, a frozen ViT's matrices are cast here; `.float()` for the CPU undoes it.
        """
        from omegaconf import OmegaConf  # pyright: ignore[reportMissingImports]

        mapping = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
        model = cls(ModelSettings.from_mapping(mapping))  # type: ignore[arg-type]
        load_start_weights(model)
        model.store_vit_in_half()
        return model

    def load_checkpoint(self, url_or_filename: str) -> LoadResult:
        """Load a checkpoint over the weights, without running code from it."""
        return load_checkpoint(self, url_or_filename)
