"""A very small CLIP model with random weights, for tests and for trying the commands without a download."""

import os

import torch

from cmlfa.model.clip import HEAD_WIDTH
from tbps_common.errors import InputError


def write_tiny_clip(
    path: str | os.PathLike[str],
    *,
    width: int = 64,
    layers: int = 2,
    embed_dim: int = 64,
    patch: int = 16,
    grid: int = 4,
    context_length: int = 32,
    vocab_size: int = 49408,
    seed: int = 0,
) -> None:
    """Write the state dict of a CLIP model of that size, initialised by open_clip under `seed`, in OpenAI's layout.

    The caller's random state is left as it was.

    Args:
        path: file to write; `.safetensors` selects that format, anything else a state dict for `torch.load`.
        width: width of both towers, a multiple of 64 (one attention head per 64).
        layers: layers of both towers.
        embed_dim: width of the joint space, a multiple of 64.
        patch: side of a patch in pixels.
        grid: side of the square grid of positions.
        context_length: longest text in tokens.
        vocab_size: rows of the token table; 49408 fits the tokenizer.
        seed: seed of the initialisation.

    Raises:
        InputError: a size that cannot work.
        OSError: the file cannot be written.
    """
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    from tbps_common.files import atomic_path
    from tbps_common.run.checkpoint import save_checkpoint

    for flag, value in (("--width", width), ("--embed_dim", embed_dim)):
        if value < HEAD_WIDTH or value % HEAD_WIDTH:
            raise InputError(f"{flag} must be a multiple of {HEAD_WIDTH}, but it is {value}.")
    for flag, value, least in (
        ("--layers", layers, 1),
        ("--patch", patch, 1),
        ("--grid", grid, 1),
        ("--context_length", context_length, 3),
        ("--vocab_size", vocab_size, 4),
    ):
        if value < least:
            raise InputError(f"{flag} must be at least {least}, but it is {value}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP(
            embed_dim=embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=layers, width=width, head_width=HEAD_WIDTH, patch_size=patch, image_size=grid * patch
            ),
            text_cfg=CLIPTextCfg(
                context_length=context_length,
                vocab_size=vocab_size,
                width=width,
                heads=width // HEAD_WIDTH,
                layers=layers,
            ),
            quick_gelu=True,
        )
    state = dict(clip.state_dict())
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import save_file

        with atomic_path(path) as temporary:
            save_file(state, temporary)
    else:
        save_checkpoint(state, path)
