"""How many rows of scores are held at once, and what to do when even those do not fit."""

import torch

DEFAULT_ROW_BUDGET = 256 << 20


def default_row_budget(device: torch.device) -> int:
    """Bytes for one block of rows: 256 MiB in host memory, a quarter of what is free on a CUDA device."""
    if device.type == "cuda":
        return max(1, torch.cuda.mem_get_info(device)[0] // 4)
    return DEFAULT_ROW_BUDGET


def rows_within(budget: int, num_gallery: int, itemsize: int) -> int:
    """Queries whose rows fit `budget` bytes; at least one."""
    return max(1, budget // max(1, num_gallery * itemsize))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller block could succeed: CUDA, host (numpy) or host (torch, which only says so in words)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def release_cached_memory() -> None:
    """Return the blocks that torch keeps for reuse to the device, so that a smaller request can be placed."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
