"""Seeds, and generator states that survive a checkpoint."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_common.run.randomness import rng_state, seed_everything, seed_worker, set_rng_state


@pytest.fixture(autouse=True)
def _generators_as_before():
    state, cudnn = rng_state(), (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    yield
    set_rng_state(state)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        *torch.randn(3).tolist(),
        int(torch.randint(1 << 30, ())),
    ]


def test_equal_seeds_draw_equal_numbers() -> None:
    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert draw() != first


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_flags(deterministic: bool) -> None:
    seed_everything(0, deterministic=deterministic)
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(InputError, match=str(seed)):
        seed_everything(seed)


def test_a_checkpoint_continues_every_generator_exactly(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    random.gauss(0, 1)  # leaves a second normal number in Python's and numpy's cache
    np.random.standard_normal()
    save_checkpoint({"rng": rng_state()}, tmp_path / "last.pth")
    expected = [draw() for _ in range(400)]  # beyond one block of numpy's 624 words
    seed_everything(99)
    # weights_only alone must read it: no numpy object may be inside
    set_rng_state(torch.load(tmp_path / "last.pth", weights_only=True)["rng"])
    assert [draw() for _ in range(400)] == expected
    set_rng_state(load_checkpoint_file(tmp_path / "last.pth")["rng"])
    assert draw() == expected[0]


@pytest.mark.parametrize("damage", ["python", "numpy", "torch"])
def test_a_damaged_state_changes_nothing(damage: str) -> None:
    state = rng_state()
    broken = {**state, damage: "nonsense"}
    expected = draw()
    set_rng_state(state)
    with pytest.raises(CheckpointError, match="random-generator state"):
        set_rng_state(broken)
    assert draw() == expected


class Draws(Dataset[list[float]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]


# Newer Pythons warn about forking a process with threads; a spawned worker could not import this module.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_follow_the_loaders_generator() -> None:
    def epoch(seed: int) -> list[torch.Tensor]:
        loader = DataLoader(
            Draws(),
            num_workers=2,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(seed),
            multiprocessing_context="fork",
        )
        return [torch.stack(item) for item in loader]

    first, second, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not torch.equal(first[0], first[1])  # the two workers draw different numbers


def test_a_worker_seeds_numpy_by_its_torch_seed() -> None:
    torch.manual_seed(2**40 + 5)
    seed_worker(0)
    after = np.random.rand()
    np.random.seed((2**40 + 5) % 2**32)
    assert after == np.random.rand()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_generator_continues_too() -> None:
    seed_everything(5)
    torch.rand(3, device="cuda")
    state = rng_state()
    expected = torch.rand(3, device="cuda")
    torch.rand(7, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
