"""From the name on the command line to something that `from_pretrained` can load."""

import os
from functools import cache
from pathlib import Path

from tbps_common.errors import InputError

SD_MARKER = "model_index.json"
CLIP_MARKER = "config.json"
SD_PARTS = ("scheduler", "tokenizer", "text_encoder", "unet", "vae")

BASE_MODEL = "runwayml/stable-diffusion-v1-5"
IMAGE_ENCODER = "openai/clip-vit-large-patch14"
# Where the files of a repository live since it was removed from the hub.
_SUCCESSORS = {BASE_MODEL: "stable-diffusion-v1-5/stable-diffusion-v1-5"}


def resolve_model(
    name: str, *, marker: str, flag: str, revision: str | None = None, cache_dir: str | None = None
) -> str:
    """A folder, or a hub name that can be loaded.

    A path that exists is taken as it is. A hub name is looked up in the local cache, then on the hub. The repository of
    Stable Diffusion 1.5 that the paper's command names was removed from the hub; where it is not cached, the one that
    has its files now is taken, and said so.

    Args:
        name: as given to the flag.
        marker: a file that the model has for certain.
        flag: for messages.
        revision: of the hub.
        cache_dir: of the hub's downloads.

    Raises:
        InputError: nothing can be found under the name.
    """
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise InputError(f"{flag} {name} is a file: name the model's folder, or a model of the Hugging Face hub")
    if not _is_hub_name(name):
        raise InputError(
            f"{flag} {name} is neither a folder nor the name of a model on the Hugging Face hub: check the path"
        )
    candidates = [candidate for candidate in (name, _SUCCESSORS.get(name)) if candidate]
    cached = next((candidate for candidate in candidates if _is_cached(candidate, marker, revision, cache_dir)), None)
    reason = ""
    for candidate in candidates if cached is None else [cached]:
        reason = "" if cached else _why_not_on_the_hub(candidate, marker, revision, cache_dir)
        if not reason:
            if candidate != name:
                _announce(f"{flag} {name}: that repository was removed; using its successor {candidate}")
            return candidate
    tried = " nor ".join(candidates)
    raise InputError(
        f"{flag}: there is no folder {name}, and the hub gave neither {tried} ({reason}): put the model into a folder "
        f"of that name, or give the path of its folder with {flag}"
    )


@cache
def _announce(sentence: str) -> None:
    """Print it once, although every part of a model is looked up by itself."""
    print(sentence, flush=True)


def _is_cached(repository: str, marker: str, revision: str | None, cache_dir: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, marker, cache_dir=cache_dir, revision=revision), str)


def _why_not_on_the_hub(repository: str, marker: str, revision: str | None, cache_dir: str | None) -> str:
    """Empty if the model is there, otherwise the reason in one line."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repository, marker, revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError) as error:  # removed, gated, or no network: the hub's errors derive from these
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ""


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part.strip(".") and part.isprintable() for part in parts)


def require_sd_folder(folder: str, flag: str) -> None:
    """Check that a local folder holds all parts of Stable Diffusion.

    Raises:
        InputError: a part is missing.
    """
    missing = [part for part in SD_PARTS if not (Path(folder) / part).is_dir()]
    if missing:
        raise InputError(
            f"{flag} {folder} is missing {', '.join(missing)}: name a Stable Diffusion folder in diffusers' layout "
            f"({', '.join(SD_PARTS)})"
        )


def check_model_folders(sd: str, clip: str) -> None:
    """Check the parts of both models that are local folders; hub names are looked up when they are loaded.

    Args:
        sd: value of `--pretrained_model_hf`.
        clip: value of `--image_encoder_hf`.

    Raises:
        InputError: a folder lacks a part.
    """
    if os.path.isdir(sd):
        require_sd_folder(sd, "--pretrained_model_hf")
    if os.path.isdir(clip) and not os.path.isfile(os.path.join(clip, CLIP_MARKER)):
        raise InputError(f"--image_encoder_hf {clip} has no {CLIP_MARKER}: name the folder of a CLIP model")
