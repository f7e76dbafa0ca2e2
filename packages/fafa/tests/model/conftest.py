"""Tiny models for the tests of the model side: built from a mapping and a vocabulary of thirty words."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fafa import Blip2FAFACPR

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a the man woman with wearing red blue black white shirt coat bag shoes , ' - "
    "##s ##ing walk and skirt young light jean"
).split()
CAPTIONS = ["a man wearing a red shirt", "the woman with blue shoes", "black coat and white bag", "a light jean skirt"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `golden("fafa", prefix=...)` with an argument `case_name` runs once per stored case so named."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None or "case_name" not in metafunc.fixturenames:
        return
    folder = Path(os.environ.get("TBPS_GOLDEN", "")) / "fafa"
    cases = folder.glob(f"{marker.kwargs['prefix']}*/case.json") if os.environ.get("TBPS_GOLDEN") else []
    names = sorted(case.parent.name for case in cases)
    metafunc.parametrize("case_name", names or ["golden-folder-absent"])


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_mapping(vocabulary: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_mapping(**changes)`: the content of `model:` for a model of some 80,000 parameters, without dropout."""

    def make(**changes: Any) -> dict[str, Any]:
        qformer = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        return {
            "load_pretrained": False,
            "vit_model": "eva_clip_g",
            "image_size": 28,
            "vit_width": 24,
            "vit_depth": 2,
            "vit_heads": 3,
            "vit_precision": "fp32",
            "num_query_token": 5,
            "embed_dim": 16,
            "max_txt_len": 12,
            "tokenizer": str(vocabulary),
            "mfr_hidden_dim": 20,
            "fda_k": 3,
            **changes,
            "qformer": qformer | changes.get("qformer", {}),
        }

    return make


@pytest.fixture
def tiny(tiny_mapping: Callable[..., dict[str, Any]]) -> Callable[..., Blip2FAFACPR]:
    """`tiny(seed=0, **changes)`: the model of `tiny_mapping(**changes)`, equal for equal arguments."""

    def make(seed: int = 0, **changes: Any) -> Blip2FAFACPR:
        torch.manual_seed(seed)
        return Blip2FAFACPR.from_config(tiny_mapping(**changes))

    return make


@pytest.fixture
def batch() -> dict[str, Any]:
    """Four references, targets and captions; the first two samples are mutual positives."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(4, 3, 28, 28, generator=generator),
        "target": torch.randn(4, 3, 28, 28, generator=generator),
        "text_input": CAPTIONS,
        "query_id": torch.tensor([7, 7, 8, 9]),
    }
