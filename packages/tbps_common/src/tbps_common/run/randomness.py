"""Seeds, and the state of every random generator in a form that a checkpoint can hold.

`torch.load(weights_only=True)` refuses numpy arrays, so numpy's state is stored as a tensor and plain numbers; the
round trip is exact to the bit for all generators.
"""

import random
from typing import Any

import numpy as np
import torch

from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.distributed import Ranks, gather_objects


def seed_everything(seed: int, *, deterministic: bool = True) -> None:
    """Seed Python, numpy and torch (CPU and all CUDA devices).

    Args:
        seed: 0 to 2**32 - 1 (numpy's range).
        deterministic: let cuDNN use reproducible algorithms only; otherwise let it search for the quickest ones.

    Raises:
        InputError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"Seed {seed} is out of range; give a number from 0 to 4294967295.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def rng_state() -> dict[str, Any]:
    """State of all generators: `python`, `numpy`, `torch`, and `cuda` (this process's device) once CUDA is in use."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "pos": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def all_rng_states(ranks: Ranks) -> list[dict[str, Any]]:
    """`rng_state` of every process, by rank; every process must call it."""
    return gather_objects(rng_state()) if ranks.distributed else [rng_state()]


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue from a state of `rng_state`; a CUDA state is left aside on a machine without CUDA.

    Raises:
        CheckpointError: `state` is not a state written by `rng_state`; no generator has been changed then.
    """
    before = rng_state()
    try:
        _set(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        _set(before)
        raise CheckpointError(
            f"The checkpoint's random-generator state cannot be restored ({type(error).__name__}: {error}); "
            "resume from another checkpoint."
        ) from error


def _set(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    stored = state["numpy"]
    keys = stored["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((stored["name"], keys, stored["pos"], stored["has_gauss"], stored["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_worker(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: numpy and Python follow the worker's torch seed.

    torch has seeded itself and Python's `random` with base seed + worker id by then; numpy is seeded here with the same
    number, so that all three depend on the loader's generator alone and not on the torch version.
    """
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
