"""CMLFA in the layout of the Hugging Face hub: what `config.json` holds, and what the model card says."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cmlfa.model.tokenizer import tokenizer_files
from tbps_common.models.hub import Card, HubParts

MODEL_TYPE = "cmlfa"
CARD = Card(
    title="CMLFA: cross-modal latent feature aligning for text-to-image person re-identification",
    summary="Gives one feature for the picture of a pedestrian and one for a sentence; their cosine says how well the two fit.",
    command="cmlfa-test --checkpoint FOLDER --root_dir 'your dataset root dir'\n"
    'cmlfa-index --checkpoint FOLDER --images PICTURES && cmlfa-search --checkpoint FOLDER --text "a man in a red coat"',
    loading='cmlfa.CMLFA.from_pretrained("FOLDER")',
    data="CUHK-PEDES, ICFG-PEDES or RSTPReid (see `dataset_name` in config.json), which are given out for research on request.",
    citation="*Cross-Modal Latent Feature Aligning for Text-to-Image Person Re-identification*; the authors give no BibTeX entry.",
)


def parts_of(state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> HubParts:
    """The folder of a model.

    Args:
        state: weights under the authors' names.
        flags: the settings of the model, or all flags of its training; stored beside them is what a reader looks for first.
    """
    classifier = state.get("classifier.weight")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    config = {**plain, "model_type": MODEL_TYPE, "num_classes": len(classifier) if classifier is not None else None}
    return HubParts(state, config, tokenizer_files(), CARD)
