"""`--device`: where a command computes."""

import torch

from tbps_common.errors import InputError


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU.

    Raises:
        InputError: `cuda` is asked for, but there is no such GPU.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--local_rank {local_rank} asks for GPU {local_rank}, but {torch.cuda.device_count()} can be seen: "
                "start fewer processes, or check CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", local_rank)
    if requested == "cuda":
        raise InputError("--device cuda needs a GPU that torch can use, and there is none: run with --device cpu")
    return torch.device("cpu")


def device_sentence(requested: str, device: torch.device, precision: str) -> str:
    """What a run computes on, for its log; it says so when a GPU was hoped for and there is none."""
    if device.type == "cuda":
        return f"computing on {torch.cuda.get_device_name(device)} in {precision}"
    missing = "no GPU found: " if requested == "auto" else ""
    return f"{missing}computing on the CPU in {precision}"
