"""Files with CLIP weights: download of OpenAI's by name, and reading of the three forms they come in."""

import hashlib
import http.client
import logging
import os
import urllib.error
import warnings
import zipfile
from pathlib import Path

import torch
from open_clip.pretrained import get_pretrained_url
from torch import Tensor

from tbps_common.errors import CheckpointError
from tbps_common.models.source import find_model, is_model
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

logger = logging.getLogger("cmlfa.model")

# The models OpenAI released; the ResNets are known by name so that asking for one is answered before any download.
VIT_NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
RESNET_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
CACHE = Path("~/.cache/clip")


def read_start_weights(choice: str) -> dict[str, Tensor]:
    """Tensors of the CLIP model `--pretrain_choice` asks for: one of OpenAI's names (downloaded once) or a file.

    Raises:
        CheckpointError: unknown name, unreadable file, failed download.
    """
    return read_clip_file(find_start_weights(choice))


def find_start_weights(choice: str) -> Path:
    """The file for `--pretrain_choice`: a path, or the cached download of one of OpenAI's models.

    Raises:
        CheckpointError: a ResNet, neither a known name nor a file, or the download failed.
    """
    if choice in RESNET_NAMES:
        raise CheckpointError(
            f"--pretrain_choice {choice} is a ResNet, whose image tower has no token-level output: "
            f"choose one of {', '.join(VIT_NAMES)} or the path of a ViT model."
        )
    if choice in VIT_NAMES:
        return download(get_pretrained_url(choice.replace("/", "-"), "openai"), CACHE.expanduser())
    known_family = choice.startswith(("ViT-", "RN"))  # a wrong name of OpenAI's looks like one of a repository
    path = Path(choice if known_family else find_model(choice, "--pretrain_choice")).expanduser()
    if not is_model(path):
        raise CheckpointError(
            f"--pretrain_choice {choice!r} is neither a file nor one of {', '.join(VIT_NAMES)}: "
            "give one of these names or the path of CLIP weights (cmlfa-make-tiny-clip makes a small file)."
        )
    return path


def download(url: str, folder: Path) -> Path:
    """The file of `url` in `folder`, downloaded unless it is there and whole.

    Its SHA-256 is the second-last part of OpenAI's addresses. A download appears under its name only when its sum is
    right, so an interrupted one is never taken for the file.

    Raises:
        CheckpointError: no connection, or the sum of the download differs.
    """
    expected, name = url.split("/")[-2:]
    target = folder / name
    if target.is_file() and _sha256(target) == expected:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading %s to %s", name, target)
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=expected, progress=os.isatty(2))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} could not be downloaded ({error}): copy it to {target} on this machine, "
            "or give --pretrain_choice the path of CLIP weights."
        ) from error
    return target


def read_clip_file(path: Path) -> dict[str, Tensor]:
    """Read CLIP weights from a TorchScript archive (OpenAI's form), a state dict or a `.safetensors` file, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, or holds no tensors.
    """
    if _is_torchscript(path):
        try:
            with warnings.catch_warnings():
                # torch marks the reader as deprecated, but OpenAI's files come in no other form.
                warnings.simplefilter("ignore")
                # The archive's own unpickler knows tensors and plain containers only; nothing of it is run.
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        except RuntimeError as error:
            first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise CheckpointError(
                f"{path} is a damaged TorchScript archive ({first_line}): copy or download it again."
            ) from error
    return find_state_dict(load_checkpoint_file(path), source=str(path))[0]


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
