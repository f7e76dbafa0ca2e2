"""`mra-dad generate`: pictures of every training caption, each from a noise of its own."""

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mra.dad.records import EXTRA, GENERATED, MODEL_FILES, Process, digest, image_name, run
from mra.text.augmentation import Synonyms, eda, has_words
from mra.text.wordnet import SynonymTable, read_synonyms, require_wordnet
from tbps_common.datasets import load_processed_train
from tbps_common.errors import InputError
from tbps_common.files import atomic_path
from tbps_common.pipeline import Dropped, Record
from tbps_common.pipeline.models import (
    choose_dtype,
    load_model,
    require_effective_lora,
    require_libraries,
    require_model,
)
from tbps_common.run.device import choose_device

EMPTY, NOT_FINITE = "empty caption", "not a finite picture"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: flags, captions or models cannot be used.
    """
    require_libraries("mra-dad generate", EXTRA, "diffusers", "accelerate", *(("peft",) if args.lora else ()))
    check_flags(args)
    captions = load_processed_train(args.train_file, args.image_root).captions
    if args.captions is not None:
        captions = captions[: args.captions]
    if not captions:
        raise InputError(f"--train_file {args.train_file} holds no caption: give the training pairs")
    synonyms = SynonymTable(read_synonyms(args.synonyms)) if args.synonyms else None
    if synonyms is None and args.variants > 1:
        require_wordnet()
    pictures = [(index, variant) for index in range(len(captions)) for variant in range(args.variants)]
    records = [
        {"image": image_name(index, variant), "index": index, "variant": variant}
        for index, variant in args.shard.of(pictures)
    ]
    _refuse_foreign_pictures(args)

    @lru_cache(maxsize=2)
    def prompts(index: int) -> list[str]:
        return prompts_of(captions[index], args.variants, args.seed, index, synonyms)

    def prompt_of(record: Record) -> str:
        return prompts(record["index"])[record["variant"]]

    return run(args, GENERATED, records, settings_of(args, captions), lambda: _build(args, prompt_of))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and models that are not there.

    Raises:
        InputError: names the flag.
    """
    if args.controlnet and args.lora:
        raise InputError("--controlnet and --lora are two ways of fine-tuning: give one of them")
    for size, flag in ((args.height, "--height"), (args.width, "--width")):
        if size % 8:
            raise InputError(f"{flag} {size} is not a multiple of 8, the step of the models' latent pictures")
    if not 1 <= args.quality <= 100:
        raise InputError(f"--quality {args.quality} is out of range: give 1 to 100")
    for name, flag in ((args.model, "--model"), (args.controlnet, "--controlnet"), (args.lora, "--lora")):
        if name:
            require_model(flag, name, *MODEL_FILES)


def _refuse_foreign_pictures(args: argparse.Namespace) -> None:
    """Never draw over the pictures of the release, or of another --work."""
    if not any(Path(args.work).glob(f"{GENERATED}*.jsonl")):
        foreign = next(Path(args.images).glob("c_*_*"), None)
        if foreign is not None:
            raise InputError(f"{foreign} was not made from {args.work} and would be drawn over: give another --images")


def settings_of(args: argparse.Namespace, captions: list[str]) -> Record:
    """What the pictures depend on."""
    names = ("model", "controlnet", "lora", "height", "width", "variants", "steps", "guidance", "control_scale")
    more = ("negative_prompt", "scheduler", "seed", "quality", "precision", "synonyms")
    # A model that is fine-tuned further keeps its folder's name.
    weights = _digest_of_weights(args.controlnet or args.lora)
    settings = {name: getattr(args, name) for name in (*names, *more)}
    return {**settings, "captions": digest(*captions), "adapter_weights": weights}


def _digest_of_weights(name: str | None) -> str | None:
    """Of the weights in a folder; None for a hub id, and where there is no adapter."""
    if name is None or not Path(name).is_dir():
        return None
    joined = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        with open(path, "rb") as file:
            joined.update(hashlib.file_digest(file, "sha256").digest())
    return joined.hexdigest()[:16]


def prompts_of(caption: str, variants: int, seed: int, index: int, synonyms: Synonyms | None = None) -> list[str]:
    """The prompts of one caption; the first is the caption itself.

    A prompt depends on the caption, the seed and the caption's number, not on other captions. A caption without letters,
    which cannot be augmented, is repeated.

    Args:
        caption: of the training set.
        variants: how many prompts.
        seed: of the augmentation.
        index: number of the caption.
        synonyms: see `mra.eda`.

    Raises:
        InputError: WordNet is asked for and its data are absent.
    """
    caption = " ".join(caption.split())
    if variants == 1 or not has_words(caption):
        return [caption] * variants
    rng = random.Random(f"mra-dad {seed} {index}")
    augmented = eda(caption, num_aug=variants - 1, rng=rng, synonyms=synonyms)[:-1]
    return [caption, *(text.strip() for text in augmented)]


def _build(args: argparse.Namespace, prompt_of: Callable[[Record], str]) -> Process:
    pipeline = load_pipeline(args, choose_device(args.device))

    def process(batch: list[Record]) -> Iterator[Record | Dropped]:
        prompts = [prompt_of(record) for record in batch]
        wanted = [(record, prompt) for record, prompt in zip(batch, prompts) if prompt]
        pictures = iter(draw(pipeline, args, wanted) if wanted else ())
        for record, prompt in zip(batch, prompts):
            picture = next(pictures) if prompt else None
            if not prompt:
                yield Dropped(EMPTY)
            elif picture is None:
                yield Dropped(NOT_FINITE, {"prompt": prompt})
            else:
                write_picture(picture, Path(args.images) / record["image"], args.quality)
                yield {**record, "prompt": prompt}

    return process


def write_picture(picture: Any, path: Path, quality: int) -> None:
    """Write a JPEG file, whole or not at all. Only one run makes a picture: its folder holds 100,000 of them.

    Raises:
        OSError: the folder cannot be written, or the disk is full; no part of the file is left.
    """
    with atomic_path(path, one_writer=True) as temporary:
        picture.save(temporary, format="JPEG", quality=quality)


def load_pipeline(args: argparse.Namespace, device: torch.device) -> Any:
    """The text-to-image pipeline of `--model` with `--controlnet` or `--lora`, on `device`.

    Raises:
        InputError: a model cannot be loaded, or they do not belong together.
    """
    import diffusers

    dtype = choose_dtype(args.precision, device, on_gpu="fp16")
    common: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    more: dict[str, Any] = {}
    if args.controlnet:
        loader = diffusers.ControlNetModel.from_pretrained
        more["controlnet"] = load_model("--controlnet", args.controlnet, loader, **common)
    loader = diffusers.AutoPipelineForText2Image.from_pretrained
    pipeline: Any = load_model("--model", args.model, loader, **common, **more)
    if args.lora:
        load_model("--lora", args.lora, pipeline.load_lora_weights, use_safetensors=True)
        require_effective_lora("--lora", args.lora, pipeline)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would put black pictures in the place of some; the next stage filters
    if args.controlnet:
        _check_fit(pipeline, args)
    if args.scheduler != "model":
        kind = {
            "ddim": diffusers.DDIMScheduler,
            "dpm": diffusers.DPMSolverMultistepScheduler,
            "unipc": diffusers.UniPCMultistepScheduler,
        }[args.scheduler]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_fit(pipeline: Any, args: argparse.Namespace) -> None:
    own, theirs = pipeline.controlnet.config, pipeline.unet.config
    for name in ("cross_attention_dim", "block_out_channels", "in_channels"):
        if own[name] != theirs[name]:
            raise InputError(
                f"--controlnet {args.controlnet} was not made for --model {args.model} ({name} {own[name]} and "
                f"{theirs[name]}): give the model that it was fine-tuned with"
            )


def draw(pipeline: Any, args: argparse.Namespace, wanted: list[tuple[Record, str]]) -> list[Any]:
    """Pictures of (record, prompt) pairs, in order; None where the network gave no finite numbers.

    The noise of a picture comes from a generator of its own on the CPU: it is the same on every device and in every
    batch.
    """
    generators = [
        torch.Generator().manual_seed(image_seed("noise", args.seed, record["index"], record["variant"]))
        for record, _ in wanted
    ]
    prompts = [prompt for _, prompt in wanted]
    more: dict[str, Any] = {}
    if args.negative_prompt:
        more["negative_prompt"] = [args.negative_prompt] * len(prompts)
    if args.controlnet:
        white = Image.new("RGB", (args.width, args.height), "white")
        more |= {"image": [white] * len(prompts), "controlnet_conditioning_scale": args.control_scale}
    tensors = pipeline(
        prompt=prompts,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=generators,
        output_type="pt",
        **more,
    ).images
    return [_picture(tensor) if bool(torch.isfinite(tensor).all()) else None for tensor in tensors]


def _picture(tensor: Any) -> Any:
    """`[3, h, w]` in 0..1 -> picture."""
    pixels = tensor.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def image_seed(*parts: int | str) -> int:
    """63 bits that depend on all parts and nothing else."""
    text = "/".join(map(str, parts)).encode("utf-8")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
