"""`--device` and `--tf32`: where a command computes, and how exactly."""

import torch

from tbps_common.errors import InputError


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """The device that a flag names.

    Args:
        requested: `auto` is this process's GPU where there is one and else the CPU; `cuda` is this process's GPU;
            `cuda:N` is GPU N; `cpu`.
        local_rank: place of this process among those of this machine.

    Raises:
        InputError: a GPU is asked for that torch does not see, or `requested` is something else.
    """
    name, _, number = requested.partition(":")
    if name not in ("auto", "cpu", "cuda") or (number and (name != "cuda" or not number.isdecimal())):
        raise InputError(f"--device {requested} is not one of auto, cpu, cuda, cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        index = int(number) if number else local_rank
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--device {requested} of process {local_rank} asks for GPU {index}, but {torch.cuda.device_count()} can "
                "be seen: start fewer processes, or check CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", index)
    if name == "cuda":
        raise InputError(
            f"--device {requested} needs a GPU that torch can use, and there is none: run with --device cpu"
        )
    return torch.device("cpu")


def allow_tf32(allowed: bool) -> None:
    """Let this process's float32 products on a GPU round their operands to TF32; rankings ask for their own precision."""
    products = torch.backends.cuda.matmul
    if allowed and hasattr(products, "fp32_precision"):  # torch 2.9 and later
        products.fp32_precision = "tf32"
    elif allowed:
        products.allow_tf32 = True


def device_sentence(requested: str, device: torch.device, precision: str) -> str:
    """What a run computes on, for its log; it says so when a GPU was hoped for and there is none."""
    if device.type == "cuda":
        return f"computing on {torch.cuda.get_device_name(device)} in {precision}"
    missing = "no GPU found: " if requested == "auto" else ""
    return f"{missing}computing on the CPU in {precision}"
