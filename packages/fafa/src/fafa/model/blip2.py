"""`Blip2FAFACPR`: FAFA on the towers of transformers."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from fafa.model.fafa import FAFA
from fafa.model.layout import POSITION_IDS, layout
from fafa.model.settings import ModelSettings, read_settings
from fafa.model.start_weights import load_start_weights
from fafa.model.tokenizer import build_tokenizer
from fafa.model.versions import require_transformers
from fafa.model.weights import LoadResult, load_official_state_dict


class Blip2FAFACPR(FAFA):
    """The model of the paper: a frozen EVA or CLIP ViT, the Q-Former, and FAFA's objectives.

    Args:
        settings: sizes, precision and objectives. Weights are random; `from_config` and `from_pretrained` load them.
        empty_vit: leave the ViT's weights as memory is, because a file's will take their place.

    Raises:
        InputError: the tokenizer cannot be had, or transformers is older than 5.17.
    """

    def __init__(self, settings: ModelSettings, empty_vit: bool = False):
        require_transformers()
        # An older transformers lacks what these import, and the sentence above should be what its user reads.
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
    def from_pretrained(cls, model_type: str) -> Self:
        """The same for a built-in backbone (`pretrain`, `pretrain_vitL`, `coco`) or a YAML file."""
        return cls._started(read_settings(model_type))

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
        wanted = [entry.official for entry in layout(settings) if entry.official != POSITION_IDS and not entry.twin]
        absent = [key for key in wanted if key not in state and not key.startswith("mlm_predictor.")]
        if any(key.startswith("visual_encoder.") for key in absent):
            model = cls._started(settings)
        else:
            model = cls(settings, empty_vit=True)
            if absent:
                load_start_weights(model)
        return model, load_official_state_dict(model, state)
