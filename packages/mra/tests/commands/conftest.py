"""A tiny world in which the paper's commands take seconds, and ways to run them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tbps_world.checks import assert_same
from tbps_world.tiny.mra import Preset, make_vocabulary, write_tiny

PACKAGE = Path(__file__).resolve().parents[2]

# Smaller than the presets of mra-make-tiny: two layers of text, and no drop-out, so that runs can be compared.
TEST_PRESET = Preset(
    pretraining_size=(96, 96, 3),
    finetuning_size=(96, 96, 3),
    vision={
        "vision_width": 32,
        "embed_dim": 4,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 4],
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
    },
    text={
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "fusion_layer": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    all_tasks={
        "embed_dim": 16,
        "itc_dop": 0.1,
        "lr_2": False,
        "max_tokens": 32,
        "batch_size_train": 16,
        "batch_size_test": 16,
        "batch_size_test_text": 64,
        "k_test": 8,
        "optimizer.lr": 1e-3,
        "schedular.epochs": 2,
    },
    tasks={"sda": {"schedular.num_warmup_steps": 2}, "rstp": {"embed_dim": 256}},
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands run; tests must not write outside `out/`."""
    from tbps_world.cli import synth_main

    root = tmp_path_factory.mktemp("world")
    arguments = ["--out", str(root), "--preset", "tiny", "--layouts", "cuhk,icfg,rstp,finetune,sda"]
    assert synth_main([*arguments, "--ids", "22"]) == 0
    lexicon = (root / "lexicon.txt").read_text(encoding="utf-8").splitlines()
    write_tiny(root, TEST_PRESET, make_vocabulary(lexicon), seed=0)
    return root


@pytest.fixture
def in_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world as the working directory."""
    monkeypatch.chdir(world)
    return world


@pytest.fixture(scope="session")
def flags() -> Callable[..., list[str]]:
    """`flags(task, output_dir, *more)`: of `Retrieval.py`, without loader processes."""

    def make(task: str, output_dir: str | Path, *more: str) -> list[str]:
        return [
            *("--config", f"configs/{task}.yaml", "--task", task, "--output_dir", str(output_dir)),
            *("--checkpoint", "data/checkpoint/pretrain.pth", "--num_workers", "0", "--log_every", "1", *more),
        ]

    return make


@pytest.fixture(scope="session")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> Path:
    """The output folder of `--task cuhk`, two epochs. Tests must not write into it."""
    from mra.cli import retrieval_main

    folder = tmp_path_factory.mktemp("trained") / "ft_cuhk"
    before = Path.cwd()
    os.chdir(world)
    try:
        assert retrieval_main(flags("cuhk", folder)) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def start_script() -> Callable[..., subprocess.Popen[str]]:
    """`start_script("run.py", flags, cwd=...)`: start a script as a user does."""

    def start(script: str, flags: list[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, script, *flags],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """`assert_same_run(one, other)`: both folders hold the same bits in all checkpoints, and the same log.txt."""

    def compare(one: Path, other: Path) -> None:
        import torch

        names = sorted(path.name for path in one.glob("*.pth"))
        assert names == sorted(path.name for path in other.glob("*.pth"))
        for name in names:
            stored = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
            assert_same(*stored, name)
        assert (one / "log.txt").read_text() == (other / "log.txt").read_text()

    return compare
