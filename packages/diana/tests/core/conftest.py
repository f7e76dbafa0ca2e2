"""A model, a tokenizer and data small enough for every test; nothing is downloaded, nothing needs a GPU."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diana import DiaNAConfig, DiaNAModel
from diana.tokenizer import load_tokenizer
from tbps_world.tiny.diana import tiny_tokenizer

WORDS = (
    "a man woman with red blue grey coat jeans shoes bag wore what about his her carrying black please describe".split()
)

# As in Llama's vocabulary, a full stop and the line break after it make one token.
LINE_ENDS = [".\n", "!\n", " \n\n"] * 40


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level BPE tokenizer in Llama-3's layout."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer([*WORDS, *LINE_ENDS], 320).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_settings(tokenizer: Any) -> dict[str, Any]:
    """Keyword arguments of a DiaNAConfig with four SwinV2 stages and two Llama layers."""
    return {
        "vision_config": {
            "embed_dim": 8,
            "depths": [1, 2, 1, 1],
            "num_heads": [2, 2, 4, 4],
            "window_size": 4,
            "image_size": [64, 32],
            "mlp_ratio": 2.0,
            "drop_path_rate": 0.0,
        },
        "llama_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "rope_theta": 500000.0,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
        },
        "refiner_config": {
            "enable_refiner": True,
            "enable_sdm": True,
            "num_query": 3,
            "num_hidden_layers": 1,
            "sim_type": "avg",
        },
        "embed_dim": 64,
        "enable_sdm": True,
    }


@pytest.fixture
def tiny_config(tiny_settings: dict[str, Any]) -> Callable[..., DiaNAConfig]:
    """`tiny_config(vision_config={"drop_path_rate": 0.3}, ...)`: the settings above with entries replaced."""

    def make(**changes: Any) -> DiaNAConfig:
        settings = copy.deepcopy(tiny_settings)
        for name, value in changes.items():
            settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
        return DiaNAConfig(**settings)

    return make


@pytest.fixture
def tiny_model(tiny_config: Callable[..., DiaNAConfig]) -> Callable[..., DiaNAModel]:
    """`tiny_model(**changes)`: the same random weights at every call, in evaluation mode."""

    def make(**changes: Any) -> DiaNAModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DiaNAModel(tiny_config(**changes)).eval()

    return make


@pytest.fixture
def batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Four pairs, two of them of one person, with dialogues of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([11, 16, 7, 13])
    mask = (torch.arange(16) < lengths[:, None]).long()
    ids = torch.randint(0, 250, (4, 16), generator=generator)
    return {
        "pixel_values": torch.randn(4, 3, 64, 32, generator=generator),
        "input_ids": torch.where(mask == 1, ids, tokenizer.pad_token_id),
        "attention_mask": mask,
        "image_ids": torch.tensor([[3], [5], [3], [9]]),
    }


@pytest.fixture
def picture_folder(tmp_path: Path) -> Iterator[Path]:
    """Six pictures p0.png to p5.png."""
    folder = tmp_path / "imgs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    for number in range(6):
        pixels = torch.randint(0, 255, (40 + number, 20, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"p{number}.png")
    yield folder


@pytest.fixture
def golden_model(golden: Any) -> Callable[..., DiaNAModel]:
    """`golden_model(case)`: the model of a stored case with its weights (those of `model_a` where it has none)."""

    def build(case: Any, *, prefixes: tuple[str, ...] = ("",), strict: bool = True) -> DiaNAModel:
        own = case.folder / "weights.safetensors"
        source = case if own.is_file() else golden("model_a")
        settings = case.case.get("config") or golden("model_a").case["config"]
        model = DiaNAModel(DiaNAConfig(**settings))
        weights = source.tensors("weights.safetensors")
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}
        assert not model.load_state_dict(weights, strict=strict).unexpected_keys
        return model.eval()

    return build
