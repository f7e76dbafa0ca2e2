"""FAFA in the layout of the Hugging Face hub: what `config.json` holds, and what the model card says."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fafa.model.settings import ModelSettings
from tbps_common.models.hub import Card, HubParts

MODEL_TYPE = "fafa"
VOCABULARY = "vocab.txt"
CARD = Card(
    title="FAFA: fine-grained adaptive feature alignment for composed person retrieval",
    summary="Finds the person of a picture, changed as a sentence says: picture and sentence give one feature, a gallery image gives "
    "several tokens.",
    command="fafa-infer --exp-dir FOLDER --itcpr-root /path/to/ITCPR\n"
    'fafa-index --exp-dir FOLDER --images PICTURES && fafa-search --exp-dir FOLDER --image person.jpg --text "now in a red coat"',
    loading='fafa.Blip2FAFACPR.from_pretrained("FOLDER")',
    data="SynCPR (synthetic) for training, ITCPR for the test, both of the authors; ITCPR's images stand under the terms of Celeb-reID, "
    "PRCC and LaST.",
    citation="""```bibtex
@misc{liu2025automaticsyntheticdatafinegrained,
  title  = {Automatic Synthetic Data and Fine-grained Adaptive Feature Alignment for Composed Person Retrieval},
  author = {Delong Liu and Haiwen Li and Zhaohui Hou and Zhicheng Zhao and Fei Su and Yuan Dong},
  year   = {2025}, eprint = {2311.16515}, archivePrefix = {arXiv}
}
```""",
)


def parts_of(
    state: Mapping[str, Tensor], settings: ModelSettings, hyperparameters: Mapping[str, Any], words: Mapping[str, int]
) -> HubParts:
    """The folder of a model.

    Args:
        state: weights under LAVIS's names.
        settings: of the model; what it started from is dropped.
        hyperparameters: `fda_k`, `transform` and the like, as in `training_hyperparameters.json`.
        words: the tokenizer's vocabulary, `[DEC]` behind it or not.
    """
    alone = replace(settings.without_start_weights(), tokenizer=VOCABULARY)
    config = {"model_type": MODEL_TYPE, "model": alone.to_mapping(), "hyperparameters": dict(hyperparameters)}
    lines = sorted((word for word in words if word != "[DEC]"), key=words.__getitem__)
    return HubParts(state, config, {VOCABULARY: "\n".join(lines) + "\n"}, CARD)
