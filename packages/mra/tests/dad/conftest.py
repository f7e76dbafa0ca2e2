"""A tiny world and tiny models, on which every stage takes about a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mra.cli import dad_main

SIZE = ("--height", "64", "--width", "32")
SYNONYMS = {
    "man": ["guy"],
    "woman": ["lady", "female"],
    "coat": ["overcoat"],
    "wearing": ["dressed in"],
    "red": ["crimson"],
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, images, synonyms and models; tests must not write into it."""
    from tbps_world.cli import dad_tiny_main, synth_main

    root = tmp_path_factory.mktemp("dad")
    assert synth_main(["--out", str(root), "--preset", "tiny", "--layouts", "cuhk,finetune", "--ids", "12"]) == 0
    (root / "synonyms.json").write_text(json.dumps(SYNONYMS), encoding="utf-8")
    flags = ["--out", str(root / "models"), "--lexicon", str(root / "lexicon.txt"), *SIZE]
    assert dad_tiny_main(flags) == 0
    return root


@pytest.fixture(scope="session")
def pairs(world: Path) -> list[str]:
    """`--train_file` and `--image_root`."""
    return [
        *("--train_file", str(world / "data/finetune/cuhk_train.json")),
        *("--image_root", str(world / "images/CUHK-PEDES/imgs")),
    ]


@pytest.fixture(scope="session")
def flags(world: Path, pairs: list[str]) -> Callable[..., list[str]]:
    """`flags(command, folder, *more)`: a stage on the tiny models, writing below `folder`."""
    models = world / "models"
    of: dict[str, list[str]] = {
        "finetune": [
            *("--model", str(models / "diffusion"), "--epochs", "1", "--batch_size", "4", "--num_workers", "0"),
            *("--warmup", "2", "--lr", "1e-3", "--log_every", "2", *pairs, *SIZE),
        ],
        "generate": [
            *("--model", str(models / "diffusion"), "--captions", "3", "--variants", "4", "--steps", "2"),
            *("--synonyms", str(world / "synonyms.json"), "--batch_size", "4", *pairs, *SIZE),
        ],
        "filter": [
            "--pose_model",
            str(models / "pose"),
            "--any_order",
            "--min_chroma",
            "1",
            "--min_chroma_spread",
            "1",
        ],
        "caption": ["--model", str(models / "captioner"), "--max_tokens", "6"],
        "regions": ["--model", str(models / "detector")],
    }

    def make(command: str, folder: Path, *more: str) -> list[str]:
        folders = ["--work", str(folder / "work"), "--images", str(folder / "images")]
        if command == "finetune":
            folders = ["--out", str(folder / "model")]
        elif command == "regions":
            folders += ["--sda", str(folder / "sda")]
        return [command, *folders, *of[command], "--device", "cpu", *more]

    return make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> Path:
    """A folder in which all stages have run; tests must not write into it."""
    folder = tmp_path_factory.mktemp("made")
    for command in ("finetune", "generate", "filter", "caption", "regions"):
        more = ["--controlnet", str(folder / "model/controlnet")] if command == "generate" else []
        assert dad_main(flags(command, folder, *more)) == 0
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
