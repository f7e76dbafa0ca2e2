"""Small models and data for the tests of cmlfa: nothing is downloaded, nothing needs a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlfa import build_model, get_args, load_checkpoint
from cmlfa.model import CMLFA
from tbps_world.tiny.clip import write_tiny_clip

# A CLIP with so few words that the token table is small; its ids are made by hand in the tests.
TOY_VOCABULARY = 96


@pytest.fixture(scope="session")
def toy_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of width 64 with 2 layers, a 4 x 4 position grid and 96 words."""
    path = tmp_path_factory.mktemp("clip") / "toy.pt"
    write_tiny_clip(path, context_length=12, vocab_size=TOY_VOCABULARY)
    return path


@pytest.fixture(scope="session")
def toy_args(toy_clip: Path) -> Callable[..., Any]:
    """`toy_args(**flags)`: all flags at their defaults but for the toy model's sizes and `flags`."""

    def make(**flags: Any) -> Any:
        args = get_args([])
        toy = {
            "pretrain_choice": str(toy_clip),
            "img_size": (64, 32),
            "text_length": 12,
            "vocab_size": TOY_VOCABULARY,
            "cmt_depth": 1,
            "lfa_layers": 2,
            "loss_names": "sdm+mlm+id+itc",
            "precision": "fp32",
        }
        vars(args).update(toy | flags)
        return args

    return make


@pytest.fixture
def toy_model(toy_args: Callable[..., Any]) -> Callable[..., CMLFA]:
    """`toy_model(**flags)`: a small model with 5 classes, the same weights at every call."""

    def make(**flags: Any) -> CMLFA:
        torch.manual_seed(0)
        return build_model(toy_args(**flags), 5)

    return make


@pytest.fixture
def toy_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """`toy_batch(size, clean=False)`: random images and captions; three words of each caption are masked."""

    def make(size: int = 4, clean: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        start, end, mask = TOY_VOCABULARY - 2, TOY_VOCABULARY - 1, TOY_VOCABULARY - 3
        ids = torch.zeros(size, 12, dtype=torch.int64)
        ids[:, 0] = start
        ids[:, 1:9] = torch.randint(1, mask, (size, 8), generator=generator)
        ids[:, 9] = end
        labels = torch.zeros_like(ids)
        labels[:, [2, 5, 7]] = ids[:, [2, 5, 7]]
        masked = torch.where(labels > 0, mask, ids)
        return {
            "pids": torch.randint(0, 5, (size,), generator=generator),
            "images": torch.randn(size, 3, 64, 32, generator=generator),
            "caption_ids": ids if clean else masked.clone(),
            "mlm_ids": masked,
            "mlm_labels": labels,
        }

    return make


@pytest.fixture(scope="session")
def build_golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CMLFA]:
    """`build_golden_model(case, **flags)`: the model of a stored `model` case, with its weights, in evaluation mode."""

    def build(golden_case: Any, *, load: bool = True, **flags: Any) -> CMLFA:
        weights = golden_case.tensors("weights.safetensors")
        prefix = "base_model."
        clip = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        clip["visual.positional_embedding"] = golden_case.tensors()["clip_visual_positional_embedding"]
        start = tmp_path_factory.mktemp("golden") / "clip.pt"
        torch.save(clip, start)
        args = get_args([])
        vars(args).update({**golden_case.case["args"], "pretrain_choice": str(start), "precision": "fp32", **flags})
        model = build_model(args, golden_case.case["num_classes"])
        if load:
            load_checkpoint(model, weights)
        return model.eval()

    return build
