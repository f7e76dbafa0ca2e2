"""`fafa-syncpr images`: one wide picture per quadruple and variant, cut into reference (left) and target (right)."""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fafa.syncpr.prompts import image_prompt
from fafa.syncpr.records import IMAGES, is_own, key_in, load_quadruples
from fafa.syncpr.text_to_image import Sampling, TextToImage, load_lora, load_pipeline
from tbps_common.errors import InputError
from tbps_common.files import atomic_path
from tbps_common.pipeline import Dropped, Record, in_batches, run_stage
from tbps_common.pipeline.models import choose_dtype, require_libraries, require_model
from tbps_common.run.batches import item_seed
from tbps_common.run.device import choose_device, device_sentence

_ASPECT_TOLERANCE = 0.02
_SETTINGS = (
    "model revision lora lora_scale height width half_height half_width steps guidance negative_prompt "
    "prompt_template seed folder_size dtype"
).split()


def main(flags: argparse.Namespace) -> int:
    """Make the pictures that are missing; returns the exit status.

    Raises:
        InputError: flags, quadruples or the model cannot be used.
    """
    check_template(flags.prompt_template)
    _check_sizes(flags)
    extra = ("diffusers", "transformers", *(("peft",) if flags.lora else ()))
    require_libraries("fafa-syncpr images", "packages/fafa[syncpr]", *extra)
    require_model("--model", flags.model, "model_index.json")
    quadruples, duplicates = load_quadruples(flags.out)
    if duplicates:
        print(f"{duplicates} quadruples repeat a caption of another shard's and are left out")
    prompts = {
        of: image_prompt(flags.prompt_template, one.caption_1, one.caption_2)
        for of, one in quadruples.items()
        if is_own(flags.shard, of)
    }
    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device, on_gpu="bfloat16")
    print(device_sentence(flags.device, device, str(dtype).removeprefix("torch.")))
    pipeline = load_pipeline(flags.model, flags.revision, dtype)
    if flags.lora:
        load_lora(pipeline, flags.lora, flags.lora_scale)
    painter = TextToImage(pipeline, device)
    cut = sum(map(painter.is_cut, prompts.values()))
    if cut:
        print(
            f"{cut} of {len(prompts)} prompts have more than the {painter.longest_prompt} tokens that the model reads: "
            "their ends (the right half) have no effect; use a model that reads more, or a shorter --prompt-template"
        )
    sampling = Sampling(flags.height, flags.width, flags.steps, flags.guidance, flags.negative_prompt)

    def make(batch: list[Record]) -> Iterator[Record | Dropped]:
        seeds = [item_seed(flags.seed, item["quadruple_id"], item["variant"]) for item in batch]
        pictures = painter.paint([prompts[item["quadruple_id"]] for item in batch], seeds, sampling)
        for item, seed, picture in zip(batch, seeds, pictures, strict=True):
            if picture is None:
                yield Dropped("blanked by the model's safety checker", {"seed": seed})
            elif picture.convert("RGB").getcolors(maxcolors=1) is not None:  # numbers too large for 16 bits, say
                yield Dropped("a picture of one colour", {"seed": seed})
            else:
                yield {**item, **_save(picture, item, flags), "seed": seed}

    output = flags.shard.file(flags.out, IMAGES)
    outcome = run_stage(
        [{"quadruple_id": of, "variant": variant} for of in prompts for variant in range(flags.variants)],
        in_batches(make, flags.batch_size),
        output,
        key=key_in(output),
        settings={name: getattr(flags, name) for name in _SETTINGS}
        | ({"lora_sha256": file_mark(flags.lora)} if flags.lora else {}),
        notes={"command": "fafa-syncpr images", "device": str(painter.device), "cut_prompts": cut},
        unit="picture",
    )
    print(outcome.sentence("picture"))
    return outcome.exit_status


def picture_paths(quadruple: int, variant: int, folder_size: int) -> dict[str, str]:
    """Where a picture and its halves lie, relative to `--out`: `whole`, `left`, `right`."""
    folder, name = f"test{1 + quadruple // folder_size}", f"{quadruple}-{variant}"
    halves = {side: f"{folder}/sub_img/img_{side}/{name}_{side}.png" for side in ("left", "right")}
    return {"whole": f"{folder}/img/{name}.png", **halves}


def cut_in_two(picture: Image.Image, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Left and right half, each resized to `height` x `width` if it has another size."""
    middle = picture.width // 2
    boxes = ((0, 0, middle, picture.height), (middle, 0, 2 * middle, picture.height))
    left, right = (
        half if half.size == (width, height) else half.resize((width, height), Image.Resampling.BICUBIC)
        for half in (picture.crop(box) for box in boxes)
    )
    return left, right


def check_template(template: str) -> None:
    """Require both captions, in their order.

    Raises:
        InputError: one is missing, or they are given in another way.
    """
    if template.count("{caption_1}") != 1 or template.partition("{caption_1}")[2].count("{caption_2}") != 1:
        raise InputError("--prompt-template must hold {caption_1} once, and {caption_2} once after it")


def file_mark(path: str) -> str:
    """SHA-256 of a file (or of the LoRA file of a folder), so that another file under the same name is noticed."""
    file = Path(path)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        return ""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _check_sizes(flags: argparse.Namespace) -> None:
    if flags.height % 8 or flags.width % 16:
        raise InputError(
            f"--height {flags.height} and --width {flags.width}: the height must be a multiple of 8, the width of 16"
        )
    wanted = 2 * flags.half_width / flags.half_height
    if abs(flags.width / flags.height / wanted - 1) > _ASPECT_TOLERANCE:
        raise InputError(
            f"halves of a picture of {flags.height} x {flags.width} (height x width) would be distorted to "
            f"{flags.half_height} x {flags.half_width}: choose --width {round(flags.height * wanted / 16) * 16} for this "
            "--height, or other halves with --half-height and --half-width"
        )
    if flags.lora and not Path(flags.lora).exists() and (flags.lora.count("/") != 1 or flags.lora.startswith(".")):
        raise InputError(f"--lora {flags.lora} does not exist: check the path")


def _save(picture: Image.Image, item: Record, flags: argparse.Namespace) -> dict[str, str]:
    paths = picture_paths(item["quadruple_id"], item["variant"], flags.folder_size)
    left, right = cut_in_two(picture.convert("RGB"), flags.half_height, flags.half_width)
    for name, image in (("whole", picture), ("left", left), ("right", right)):
        if name != "whole" or not flags.halves_only:
            with atomic_path(Path(flags.out) / paths[name], one_writer=True) as temporary:
                image.save(temporary, format="PNG")
    return {"left": paths["left"], "right": paths["right"]}
