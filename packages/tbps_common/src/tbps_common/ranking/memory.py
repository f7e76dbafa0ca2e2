"""What to do when a block of work does not fit memory."""

import torch


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
