"""`mra-dad-toy`: from nothing to MRA pre-trained on a data set of its own making, with tiny networks.

Every step is an ordinary command, shown before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.tiny.dad import MANIFEST_NAME as TINY_MANIFEST
from tbps_world.toys.mra_steps import run_script
from tbps_world.toys.steps import StepFailed, call

DESCRIPTION = """\
Draw a world of synthetic pedestrians, make tiny networks, run all five stages of mra-dad on them, and pre-train MRA's toy
on the result. Needs no download and no GPU. Every step is shown as the command it is.
"""

SIZE = ("--height", "64", "--width", "32")
MODELS = "models"
SHEET_NAME, METRICS_NAME = "pictures.png", "metrics.json"


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on.

    Raises:
        InputError: `--out` is a file, or a library is missing.
    """
    parser = argparse.ArgumentParser(prog="mra-dad-toy", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="dad_toy", metavar="DIR", help="folder for everything that is written")
    parser.add_argument("--ids", type=whole_number(8), default=100, help="synthetic persons")
    parser.add_argument("--steps", type=whole_number(0), default=900, help="training steps of the tiny diffusion model")
    parser.add_argument("--captions", type=whole_number(1), default=20, help="captions to make pictures of")
    parser.add_argument("--variants", type=whole_number(1), default=4, help="pictures per caption")
    parser.add_argument(
        "--epochs", type=whole_number(1), default=1, help="epochs of the fine-tuning and the pre-training"
    )
    args = parser.parse_args(argv)
    from tbps_common.pipeline.models import require_libraries

    require_libraries("mra-dad-toy", "packages/mra[dad]", "diffusers", "accelerate")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    started = time.perf_counter()
    try:
        _make_world(out, args.ids)
        with working_directory(out):
            _make_models(args.steps)
            _run_stages(args)
        _pretrain(out, args.epochs)
    except StepFailed as failure:
        return failure.status
    _conclude(out, time.perf_counter() - started)
    return 0


def _make_world(out: Path, persons: int) -> None:
    from tbps_world.cli import mra_tiny_main, synth_main

    layouts = ["--preset", "tiny", "--layouts", "cuhk,finetune", "--ids", str(persons)]
    call("tbps-synth", synth_main, ["--out", str(out), *layouts])
    call("mra-make-tiny", mra_tiny_main, ["--out", str(out), "--lexicon", str(out / "lexicon.txt")])


def _make_models(steps: int) -> None:
    if (Path(MODELS) / TINY_MANIFEST).is_file():
        print(f"\n{MODELS} is there already")
        return
    from tbps_world.cli import dad_tiny_main

    flags = ["--out", MODELS, "--lexicon", "lexicon.txt", "--steps", str(steps), *SIZE]
    call("mra-dad-make-tiny", dad_tiny_main, flags)


def _run_stages(args: argparse.Namespace) -> None:
    model = ("--model", f"{MODELS}/diffusion", *SIZE)
    training = (
        "--epochs",
        str(args.epochs),
        "--warmup",
        "10",
        "--lr",
        "5e-4",
        "--num_workers",
        "0",
        "--log_every",
        "10",
    )
    _stage("finetune", *model, *training)
    sampling = ("--steps", "25", "--guidance", "3", "--synonyms", "data/synonyms.json")
    amount = ("--captions", str(args.captions), "--variants", str(args.variants))
    _stage("generate", *model, "--controlnet", "data/dad/model/controlnet", *amount, *sampling)
    # A random pose model finds key points anywhere, so hardly more than their number is asked for.
    loose = ("--any_order", "--min_extent", "0.1")
    _stage("filter", "--pose_model", f"{MODELS}/pose", *loose)
    _stage("caption", "--model", f"{MODELS}/captioner", "--max_tokens", "30")
    _stage("regions", "--model", f"{MODELS}/detector")


def _stage(name: str, *flags: str) -> None:
    from mra.cli import dad_main

    call("mra-dad", dad_main, [name, *flags])


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Be in a folder for the length of the context, so that the commands can be shown as one types them there."""
    before = Path.cwd()
    print(f"\n$ cd {folder}")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _pretrain(out: Path, epochs: int) -> None:
    """Train on the result, or go on with what an earlier call has begun."""
    folder = "out/pre_sda"
    arguments = ["--task", "sda", "--dist", "f4", "--output_dir", folder, "--epo", str(epochs), "--num_workers", "1"]
    if (out / folder / "last.pth").is_file():
        arguments.append("--resume")
    run_script(out, arguments)


def _conclude(out: Path, seconds: float) -> None:
    from prettytable import PrettyTable

    from tbps_common.files import write_json

    stages = {}
    table = PrettyTable(["stage", "items", "kept", "dropped", "per second"])
    model = json.loads((out / "data/dad/model/manifest.json").read_text(encoding="utf-8"))
    pairs = model["steps"] * model["settings"]["pairs_per_step"]
    table.add_row(["finetune", pairs, "", "", f"{pairs / max(model['seconds'], 1e-9):.1f}"])
    from mra.dad.records import MADE_BY

    for stem in MADE_BY:
        manifest = json.loads((out / f"data/dad/{stem}.jsonl.manifest.json").read_text(encoding="utf-8"))
        rate = manifest["items"] / max(manifest["seconds"], 1e-9)
        stages[MADE_BY[stem]] = {name: manifest[name] for name in ("items", "kept", "dropped", "seconds")}
        reasons = ", ".join(f"{reason}: {count}" for reason, count in manifest["dropped"].items()) or "none"
        table.add_row([MADE_BY[stem], manifest["items"], manifest["kept"], reasons, f"{rate:.1f}"])
    log = [json.loads(line) for line in (out / "out/pre_sda/log.txt").read_text().splitlines() if line.startswith("{")]
    losses = [float(line["loss"]) for line in log]
    write_sheet(out / SHEET_NAME, out)
    write_json(out / METRICS_NAME, {"finetune": model, "stages": stages, "pretraining": log, "seconds": seconds})
    print(f"\n{table}\nMRA's loss by epoch of the pre-training: {', '.join(f'{loss:.3f}' for loss in losses)}")
    print(f"{seconds / 60:.1f} minutes. Results:")
    print(f"  {out / SHEET_NAME}: pictures of the target set above, generated ones with their boxes below")
    print(f"  {out / METRICS_NAME}: all figures;  {out / 'data/dad'}: the records of every stage")


def write_sheet(path: Path, out: Path, columns: int = 10, rows: int = 4) -> None:
    """One row of the target data set's pictures, then generated ones: per column a caption, per row a variant.

    Args:
        path: PNG file.
        out: folder of the toy.
        columns: captions.
        rows: variants.
    """
    from PIL import Image

    from tbps_common.datasets import load_processed_train
    from tbps_common.files import atomic_path

    width, height, gap = 64, 128, 4
    data = load_processed_train(out / "data/finetune/cuhk_train.json", out / "images/CUHK-PEDES/imgs")
    records = json.loads((out / "data/sda/sda_0_5000.json").read_text(encoding="utf-8"))
    by_name = {record["image"]: record for record in records}
    shown = sorted({int(Path(name).stem.split("_")[0]) for name in by_name})[:columns]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, (rows + 1) * (height + gap) + gap), "white")
    for column, index in enumerate(shown):
        left = gap + column * (width + gap)
        sheet.paste(_open(data.image_paths[index], (width, height)), (left, gap))
        for row in range(rows):
            record = by_name.get(f"c_0_5000/{index}_{row}.jpg")
            if record is not None:
                picture = _with_boxes(_open(out / "images/SDA" / record["image"], (width, height)), record["boxes"])
                sheet.paste(picture, (left, gap + (row + 1) * (height + gap)))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _open(path: str | Path, size: tuple[int, int]) -> Any:
    from PIL import Image

    from tbps_common.images import read_image

    return read_image(path).resize(size, Image.Resampling.BICUBIC)


def _with_boxes(picture: Any, boxes: list[list[float]]) -> Any:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    for x, y, w, h in boxes[:1]:  # the surest; more would hide what is below
        corners = ((x - w / 2) * picture.width, (y - h / 2) * picture.height)
        pen.rectangle((*corners, (x + w / 2) * picture.width - 1, (y + h / 2) * picture.height - 1), outline="red")
    return picture
