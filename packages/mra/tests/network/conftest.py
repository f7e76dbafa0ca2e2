"""Small models and a small split for the tests of the network, its losses and the retrieval: nothing is downloaded."""

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mra import Retrieval

VOCABULARY = 114
TOKENS = 12


def make_config(task: str = "cuhk", **changes: Any) -> dict[str, Any]:
    """A configuration of each branch: region and MLM; EDA with pooled heads, not square; EDA with linear heads."""
    height, width, window = {"sda": (96, 96, 3), "cuhk": (192, 128, 2), "rstp": (64, 128, 2)}[task]
    config = {
        "vision_config": {
            "ckpt": "absent.pth",
            "vision_width": 32,
            "h": height,
            "w": width,
            "window_size": window,
            "embed_dim": 4,
            "depths": [2, 2, 2, 2],
            "num_heads": [1, 1, 2, 4],
            "drop_rate": 0.0,
            "drop_path_rate": 0.0,
        },
        "text_config": {
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": 24,
            "initializer_range": 0.2,
            "intermediate_size": 48,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": VOCABULARY,
            "fusion_layer": 6,
            "encoder_width": 32,
        },
        "text_encoder": "absent",
        "embed_dim": 256 if task == "rstp" else 16,
        "itc_dop": 0.0,
        "LabelSmooth": 0.0 if task == "sda" else 0.2,
        "temp": 0.07,
        "max_tokens": TOKENS,
        "max_words": TOKENS,
        "h": height,
        "w": width,
        "patch_size": 32,
        "region": 0.8 if task == "sda" else 0,
        "eda": task != "sda",
        "lr_2": task != "sda",
        "init_cross": task == "sda",
        "icfg_rstp": False,
        "erasing_p": 0.6,
        "batch_size_test": 5,
        "batch_size_test_text": 7,
        "k_test": 6,
        "test_hflip": task != "sda",
    }
    return {**config, **changes}


def make_model(task: str = "cuhk", seed: int = 0, **changes: Any) -> Retrieval:
    """A model whose projections are of ordinary size (the released initialisation makes features that hardly differ)."""
    torch.manual_seed(seed)
    model = Retrieval(make_config(task, **changes), init_backbones=False)
    if not model.settings.linear_heads:
        for head in (model.vision_proj, model.text_proj):
            torch.nn.init.normal_(head[2].weight, std=0.1)
    torch.nn.init.normal_(model.itm_head[3].weight, std=0.5)
    return model.eval()


def make_batch(model: Retrieval, size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A training batch with captions of several lengths, one identity twice."""
    generator = torch.Generator().manual_seed(seed)
    vision, tokens = model.settings.vision, model.settings.max_tokens

    def texts() -> tuple[Tensor, Tensor]:
        ids = torch.randint(5, VOCABULARY, (size, tokens), generator=generator)
        lengths = torch.randint(3, tokens + 1, (size, 1), generator=generator)
        atts = (torch.arange(tokens) < lengths).long()
        return ids * atts, atts

    ids, atts = texts()
    idx = torch.arange(size)
    idx[-1] = 0
    masked = ids.clone()
    masked[:, 1] = 4
    batch = {
        "image": torch.randn(size, 3, vision.height, vision.width, generator=generator),
        "text_ids": ids,
        "text_atts": atts,
        "text_ids_masked": masked,
        "masked_pos": torch.tensor([[1, 2, 0]]).repeat(size, 1),
        "masked_ids": torch.stack([ids[:, 1], ids[:, 2], torch.full((size,), -100)], dim=1),
        "idx": idx,
    }
    if model.settings.region > 0:
        batch["text_ids_box"], batch["text_atts_box"] = texts()
        inside = torch.rand(size, vision.num_tokens, generator=generator) < 0.4
        inside[:, 0] = True
        batch["box_atts"] = torch.cat([torch.ones(size, 1, dtype=torch.long), 1 - inside.long()], dim=1)
        batch["label"] = torch.tensor([7, 8, 7, 9])[:size]
    if model.settings.eda:
        batch["text_ids_eda"], batch["text_atts_eda"] = texts()
    return batch


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    return make_config


@pytest.fixture
def model() -> Callable[..., Retrieval]:
    return make_model


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    return make_batch


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `test.json` (23 images of 7 people, 34 captions), its images, and `bert/vocab.txt`."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "images").mkdir()
    draw, pixels = random.Random(0), np.random.default_rng(0)
    words = [f"{first}{second}" for first in "bdgkm" for second in ("ab", "oc", "ut")]
    entries = []
    for number in range(23):
        name = f"{number}.png"
        Image.fromarray(pixels.integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(folder / "images" / name)
        captions = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(1 + number % 2)]
        entries.append({"image": name, "caption": captions, "image_id": 100 + number % 7})
    (folder / "test.json").write_text(json.dumps(entries), encoding="utf-8")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join([*special, *letters, *words]) + "\n", encoding="utf-8")
    return folder


def run_group(jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Answers of `gloo_group.py` to each job, one for each of its processes."""
    torch.save(jobs, folder / "work.pt")
    program = Path(__file__).with_name("gloo_group.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr

    def answer(job: int, rank: int) -> dict[str, Any]:
        return torch.load(folder / f"answers.{job}.{rank}.pt", weights_only=True)

    return [[answer(job, rank) for rank in range(work["world"])] for job, work in enumerate(jobs)]


@pytest.fixture
def group() -> Callable[..., list[list[dict[str, Any]]]]:
    return run_group
