"""MRA in the layout of the Hugging Face hub: what `config.json` holds, and what the model card says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mra.model.settings import ModelSettings
from mra.text.vocabulary import read_vocabulary
from tbps_common.models.hub import Card, HubParts

MODEL_TYPE = "mra"
CARD = Card(
    title="MRA: domain-aligned text-based person retrieval",
    summary="Compares a sentence with pictures of pedestrians, and lets a fusion encoder judge the most similar ones again.",
    command='python3 run.py --task "cuhk" --dist "f4" --output_dir "out/eval_cuhk" --checkpoint FOLDER --evaluate\n'
    'mra-index --checkpoint FOLDER --images PICTURES && mra-search --checkpoint FOLDER --text "a man in a red coat" --rerank 32',
    loading='mra.Retrieval.from_pretrained("FOLDER")',
    data="SDA (synthetic; research only), then CUHK-PEDES, ICFG-PEDES or RSTPReid (see `test_file` in config.json), which are given "
    "out for research on request.",
    citation="""```bibtex
@article{yang2025minimizing,
  title   = {Minimizing the Pretraining Gap: Domain-Aligned Text-Based Person Retrieval},
  author  = {Yang, Shuyu and Wang, Yaxiong and Li, Yongrui and Zhu, Li and Zheng, Zhedong},
  journal = {arXiv preprint arXiv:2507.10195}, year = {2025}
}
```""",
)


def parts_of(state: Mapping[str, Tensor], config: Mapping[str, Any], text_encoder: str) -> HubParts:
    """The folder of a model.

    Args:
        state: weights under the authors' names.
        config: of the task; the two configurations that it names by path are written out.
        text_encoder: folder with `vocab.txt`.

    Raises:
        InputError: the configuration or the vocabulary cannot be used.
    """
    settings = ModelSettings.from_config(config)
    written_out = {
        "vision_config": {**settings.vision.model_dump(by_alias=True), "ckpt": ""},
        "text_config": settings.text.model_dump(by_alias=True),
        "text_encoder": ".",
        "model_type": MODEL_TYPE,
    }
    read_vocabulary(text_encoder)
    words = (Path(text_encoder) / "vocab.txt").read_bytes().decode("utf-8")
    return HubParts(state, {**config, **written_out}, {"vocab.txt": words}, CARD)
