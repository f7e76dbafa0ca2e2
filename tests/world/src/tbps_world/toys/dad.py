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
from tbps_world.toys.steps import RANDOM, StepFailed, add_start, call, link_start

DESCRIPTION = """\
Draw a world of synthetic pedestrians, run all five stages of mra-dad on it with small networks, and pre-train MRA's toy on
the result. The networks are start weights of tbps-train-tiny, which have seen other persons (--start random: networks that
the toy makes itself, whose key points and boxes mean nothing). Needs no download and no GPU. Every step is shown as the
command it is.

With --finetune_epochs it goes on to what pre-training is for: MRA is fine-tuned on the target set from its pre-training,
from one on pictures of the diffusion model as it is (not aligned with the target set), and from nothing, and all three are
tested on unseen persons.
"""

START_NAMES = ("diffusion", "captioner", "detector", "pose")
SIZES = {True: ("--height", "128", "--width", "64"), False: ("--height", "64", "--width", "32")}
"""Of the pictures: with start weights, and with the toy's own networks."""
MODELS, UNALIGNED = "models", "unaligned"
SHEET_NAME, METRICS_NAME = "pictures.png", "metrics.json"
COLUMNS = ("R1", "R5", "R10", "mAP")


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on.

    Raises:
        InputError: `--out` is a file, or a library is missing.
    """
    parser = argparse.ArgumentParser(prog="mra-dad-toy", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="dad_toy", metavar="DIR", help="folder for everything that is written")
    parser.add_argument("--ids", type=whole_number(8), default=100, help="synthetic persons")
    add_start(parser)
    parser.add_argument(
        "--steps",
        type=whole_number(0),
        default=900,
        help=f"training steps of the tiny diffusion model, with --start {RANDOM}",
    )
    parser.add_argument("--captions", type=whole_number(1), default=20, help="captions to make pictures of")
    parser.add_argument("--variants", type=whole_number(1), default=4, help="pictures per caption")
    parser.add_argument(
        "--epochs", type=whole_number(1), default=1, help="epochs of the alignment and the pre-training"
    )
    parser.add_argument(
        "--finetune_epochs", type=whole_number(0), default=0, help="epochs of each fine-tuning; 0: none is made"
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
        _find_models(out, args)
        with working_directory(out):
            _align(args)
            _run_stages(args, MODELS, "--controlnet", "data/dad/model/controlnet")
        _pretrain(out, args.epochs)
        if args.finetune_epochs:
            _compare(out, args)
    except StepFailed as failure:
        return failure.status
    _conclude(out, args, time.perf_counter() - started)
    return 0


def _make_world(out: Path, persons: int) -> None:
    from tbps_world.cli import mra_tiny_main, synth_main

    layouts = ["--preset", "tiny", "--layouts", "cuhk,finetune", "--ids", str(persons)]
    call("tbps-synth", synth_main, ["--out", str(out), *layouts])
    call("mra-make-tiny", mra_tiny_main, ["--out", str(out), "--lexicon", str(out / "lexicon.txt")])


def _find_models(out: Path, args: argparse.Namespace) -> None:
    """Put the four networks into `models`: start weights, or small ones made for this world."""
    from tbps_world.cli import dad_tiny_main

    if args.start != RANDOM:
        for name in START_NAMES:
            link_start(name, args.start, out / MODELS / name)
        return
    with working_directory(out):
        if (Path(MODELS) / TINY_MANIFEST).is_file():
            print(f"\n{MODELS} is there already")
            return
        flags = ["--out", MODELS, "--lexicon", "lexicon.txt", "--steps", str(args.steps), *SIZES[False]]
        call("mra-dad-make-tiny", dad_tiny_main, flags)


def _align(args: argparse.Namespace) -> None:
    training = ("--epochs", str(args.epochs), "--warmup", "10", "--lr", "5e-4", "--num_workers", "0")
    size = SIZES[args.start != RANDOM]
    _stage("finetune", "--model", f"{MODELS}/diffusion", *size, *training, "--log_every", "10")


def _run_stages(args: argparse.Namespace, models: str, *adapter: str) -> None:
    trained = args.start != RANDOM
    sampling = ("--steps", "25", "--guidance", "3", "--synonyms", "data/synonyms.json")
    amount = ("--captions", str(args.captions), "--variants", str(args.variants))
    _stage("generate", "--model", f"{models}/diffusion", *SIZES[trained], *adapter, *amount, *sampling)
    # A random pose model finds key points anywhere, so hardly more than their number is asked for.
    loose = () if trained else ("--any_order", "--min_extent", "0.1")
    _stage("filter", "--pose_model", f"{models}/pose", *loose)
    _stage("caption", "--model", f"{models}/captioner", "--max_tokens", "48" if trained else "30")
    _stage("regions", "--model", f"{models}/detector")


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


def _compare(out: Path, args: argparse.Namespace) -> None:
    """The same pre-training on pictures of the model as it is, then three equal fine-tunings, tested on unseen persons."""
    from tbps_world.cli import mra_tiny_main

    other = out / UNALIGNED
    call("mra-make-tiny", mra_tiny_main, ["--out", str(other), "--lexicon", str(out / "lexicon.txt")])
    for shared in ("data/finetune", "images/CUHK-PEDES"):
        place = other / shared
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to((out / shared).resolve())
    with working_directory(other):
        _run_stages(args, str(Path("..") / MODELS))
    _pretrain(other, args.epochs)
    last = f"out/pre_sda/checkpoint_{args.epochs - 1}.pth"
    for name, folder, checkpoint in _arms(out):
        where = f"out/ft_{name}"
        common = ["--task", "cuhk", "--dist", "f4", "--num_workers", "1"]
        start = ["--checkpoint", last] if checkpoint else []
        arguments = [*common, "--output_dir", where, *start, "--epo", str(args.finetune_epochs), "--select", "val"]
        if (folder / where / "last.pth").is_file():
            arguments.append("--resume")
        run_script(folder, arguments)
        tested = [*common, "--output_dir", f"out/eval_{name}", "--checkpoint", f"{where}/checkpoint_best.pth"]
        run_script(folder, [*tested, "--evaluate", "--report"])


def _arms(out: Path) -> list[tuple[str, Path, bool]]:
    """Name of each arm of the comparison, its folder, and whether it begins with a pre-training."""
    return [("none", out, False), ("unaligned", out / UNALIGNED, True), ("aligned", out, True)]


def _conclude(out: Path, args: argparse.Namespace, seconds: float) -> None:
    from prettytable import PrettyTable

    from tbps_common.files import write_json
    from tbps_common.report.evaluation import read_evaluation

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
    found = {}
    if args.finetune_epochs:
        found = {
            name: read_evaluation(folder / f"out/eval_{name}/evaluation_test.json")["metrics"]["t2i"]
            for name, folder, _ in _arms(out)
        }
    numbers = {"finetune": model, "stages": stages, "pretraining": log, "found": found, "seconds": seconds}
    write_json(out / METRICS_NAME, numbers)
    if found:
        arms = PrettyTable(["MRA pre-trained on generated pictures", *COLUMNS])
        for name, metrics in found.items():
            arms.add_row([name, *(f"{metrics[column]:.2f}" for column in COLUMNS)])
        print(f"\n{arms}")
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
