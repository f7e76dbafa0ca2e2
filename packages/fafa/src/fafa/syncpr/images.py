"""`fafa-syncpr images`: one wide picture per quadruple and variant, cut into reference (left) and target (right)."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fafa.syncpr.libraries import require_extra, require_model_folder
from fafa.syncpr.prompts import IMAGE_TEMPLATE, image_prompt
from fafa.syncpr.records import IMAGES, is_own, key_in, load_quadruples
from tbps_common.errors import InputError
from tbps_common.files import atomic_path
from tbps_common.pipeline.stages import Dropped, in_batches, run_stage
from tbps_common.run.arguments import number, whole_number

if TYPE_CHECKING:
    from PIL import Image

    from fafa.syncpr.text_to_image import TextToImage

DESCRIPTION = """\
Make the pictures of the quadruples with any text-to-image model of diffusers. Each picture shows the person twice, side by
side; it is cut into a left half (caption 1, the reference) and a right half (caption 2, the target).

  fafa-syncpr images --out syncpr --model black-forest-labs/FLUX.1-dev --lora lora/pytorch_lora_weights.safetensors \\
    --variants 10 --batch-size 4 --shard 1/8

Writes testK/img/<quadruple>-<variant>.png, the halves in testK/sub_img/img_left and img_right, images.jsonl and a
manifest. A picture depends on --seed, quadruple and variant, not on batch or shard. After a kill the same command goes on;
--variants may be raised later. One process per GPU: --device cuda:N --shard i/n.
"""

HALF = (384, 192)  # height and width that FAFA's training expects
_ASPECT_TOLERANCE = 0.02


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage, beside `--out`, `--shard`, `--device` and `--dtype`."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub name of a diffusers model"
    )
    model.add_argument("--revision", help="of the hub")
    model.add_argument("--lora", help="LoRA in diffusers' format: file, folder or hub name")
    model.add_argument("--lora-scale", type=number(0), default=1.0, help="1: as trained")
    picture = parser.add_argument_group("pictures")
    picture.add_argument("--variants", type=whole_number(1), default=10, help="pictures per quadruple")
    picture.add_argument("--height", type=whole_number(16), default=384, help="of the whole picture, as generated")
    picture.add_argument("--width", type=whole_number(16), default=384, help="of the whole picture, as generated")
    picture.add_argument("--half-height", type=whole_number(1), default=HALF[0], help="the halves are resized to it")
    picture.add_argument("--half-width", type=whole_number(1), default=HALF[1], help="the halves are resized to it")
    picture.add_argument("--steps", type=whole_number(1), default=28, help="of the sampler")
    picture.add_argument("--guidance", type=number(0), default=3.5, help="guidance scale")
    picture.add_argument("--negative-prompt", metavar="TEXT", help="for models that take one")
    picture.add_argument(
        "--prompt-template", metavar="TEXT", default=IMAGE_TEMPLATE, help="holds {caption_1} and, after it, {caption_2}"
    )
    picture.add_argument("--seed", type=whole_number(0), default=0, help="of all pictures")
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--batch-size", type=whole_number(1), default=4, help="pictures at a time")
    run_group.add_argument("--folder-size", type=whole_number(1), default=1000, help="quadruples per folder testK")
    run_group.add_argument("--halves-only", action="store_true", help="do not keep the whole pictures in testK/img")


def run(flags: argparse.Namespace) -> int:
    """Run the stage; returns the exit status."""
    check_template(flags.prompt_template)
    _check_sizes(flags)
    require_extra("images", "diffusers", "transformers", *(("peft",) if flags.lora else ()))
    require_model_folder(flags.model, "model_index.json", "--model")
    quadruples, duplicates = load_quadruples(flags.out)
    if duplicates:
        print(f"{duplicates} quadruples repeat a caption of another shard's and are left out")
    own = [of for of in quadruples if is_own(flags.shard, of)]
    items = [{"quadruple_id": of, "variant": variant} for of in own for variant in range(flags.variants)]
    from fafa.syncpr.text_to_image import Sampling

    settings = _settings(flags)
    sampling = Sampling(flags.height, flags.width, flags.steps, flags.guidance, flags.negative_prompt)
    prompts = {of: image_prompt(flags.prompt_template, one.caption_1, one.caption_2) for of, one in quadruples.items()}
    painter = _painter(flags)
    cut = _count_cut(painter, [prompts[of] for of in own])
    output = flags.shard.file(flags.out, IMAGES)
    outcome = run_stage(
        items,
        in_batches(_maker(flags, painter, sampling, prompts), flags.batch_size),
        output,
        key=key_in(output),
        settings=settings,
        unit="picture",
        notes={"command": "fafa-syncpr images", "device": str(painter.device), "cut_prompts": cut},
    )
    print(outcome.sentence("picture"))
    return outcome.exit_status


def picture_paths(quadruple: int, variant: int, folder_size: int) -> dict[str, str]:
    """Where a picture and its halves lie, relative to `--out`: `whole`, `left`, `right`."""
    folder, name = f"test{1 + quadruple // folder_size}", f"{quadruple}-{variant}"
    halves = {side: f"{folder}/sub_img/img_{side}/{name}_{side}.png" for side in ("left", "right")}
    return {"whole": f"{folder}/img/{name}.png", **halves}


def cut_in_two(picture: "Image.Image", height: int, width: int) -> "tuple[Image.Image, Image.Image]":
    """Left and right half, each resized to `height` x `width` if it has another size."""
    from PIL import Image

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


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    names = (
        "model revision lora lora_scale height width half_height half_width steps guidance negative_prompt "
        "prompt_template seed folder_size dtype"
    )
    settings = {name: getattr(flags, name) for name in names.split()}
    if flags.lora:
        settings["lora_sha256"] = file_mark(flags.lora)
    return settings


def _painter(flags: argparse.Namespace) -> "TextToImage":
    from fafa.syncpr.text_to_image import TextToImage, choose_dtype, load_lora, load_pipeline
    from tbps_common.run.device import choose_device, device_sentence

    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device)
    print(device_sentence(flags.device, device, str(dtype).removeprefix("torch.")))
    pipeline = load_pipeline(flags.model, flags.revision, dtype)
    if flags.lora:
        load_lora(pipeline, flags.lora, flags.lora_scale)
    return TextToImage(pipeline, device)


def _count_cut(painter: "TextToImage", prompts: Sequence[str]) -> int:
    cut = sum(map(painter.is_cut, prompts))
    if cut:
        print(
            f"{cut} of {len(prompts)} prompts have more than the {painter.longest_prompt} tokens that the model reads: "
            "their ends (the right half) have no effect; use a model that reads more, or a shorter --prompt-template"
        )
    return cut


def _maker(flags: argparse.Namespace, painter: "TextToImage", sampling: Any, prompts: dict[int, str]) -> Any:
    from tbps_common.run.batches import item_seed

    root = Path(flags.out)

    def make(batch: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
        seeds = [item_seed(flags.seed, item["quadruple_id"], item["variant"]) for item in batch]
        pictures = painter.paint([prompts[item["quadruple_id"]] for item in batch], seeds, sampling)
        results: list[dict[str, Any] | Dropped] = []
        for item, seed, picture in zip(batch, seeds, pictures, strict=True):
            if picture is None:
                results.append(Dropped("blanked by the model's safety checker", {"seed": seed}))
            elif _is_plain(picture):
                results.append(Dropped("a picture of one colour", {"seed": seed}))
            else:
                results.append({**item, **_save(picture, root, item, flags), "seed": seed})
        return results

    return make


def _is_plain(picture: "Image.Image") -> bool:
    """Whether all pixels have one colour: what fp16 makes of numbers that are too large, say."""
    return picture.convert("RGB").getcolors(maxcolors=1) is not None


def _save(picture: "Image.Image", root: Path, item: dict[str, Any], flags: argparse.Namespace) -> dict[str, str]:
    paths = picture_paths(item["quadruple_id"], item["variant"], flags.folder_size)
    left, right = cut_in_two(picture.convert("RGB"), flags.half_height, flags.half_width)
    for name, image in (("whole", picture), ("left", left), ("right", right)):
        if name != "whole" or not flags.halves_only:
            with atomic_path(root / paths[name], one_writer=True) as temporary:
                image.save(temporary, format="PNG")
    return {"left": paths["left"], "right": paths["right"]}
