"""`dp-toy`: the paper's own commands on synthetic pedestrians with tiny models, from nothing to captions and pictures.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_gen.model.hub import BASE_MODEL, IMAGE_ENCODER
from tbps_common.errors import InputError
from tbps_common.run.arguments import whole_number
from tbps_world.tiny.dp_gen_command import VAE_UPDATES
from tbps_world.toys.steps import RANDOM, StepFailed, add_start, call, checkout_of, echo, link_start, run_child

DESCRIPTION = """\
Draw a world of synthetic pedestrians, train a tiny editor on it with the paper's own train command, edit test images and
make new ones with it, and annotate the edits with the paper's own annotate command (a practice server on this machine
answers). Needs no download and no GPU.

The models are tiny, so the pictures are rough. They start from weights of tbps-train-tiny, which have seen other persons
(--start random: from nothing). The captions of the training name no colours: what an edit's colour is, only its
reference can say. Shown are the share of edited garments that have their reference's colour, the losses before and
after, and the attention of each attribute, which moves onto its region.
"""

# The train command of the paper's README, flag by flag, without its three folders.
README_FLAGS = (
    *("--pretrained_model_hf", BASE_MODEL),
    *("--max_train_steps", "30000"),
    *("--num_train_epochs", "30000"),
    *("--train_batch_size", "32"),
    *("--lr", "1e-5"),
    *("--unet_lr_scale", "1.0"),
    *("--checkpointing_steps", "200"),
    *("--mixed_precision", "bf16"),
    "--keep_only_last_checkpoint",
    *("--keep_interval", "10000"),
    *("--seed", "42"),
    *("--image_encoder_hf", IMAGE_ENCODER),
    *("--img_token_num", "1"),
    *("--MAX_REFERENCE_ATTRIBUTE_NUM", "3"),
    *("--resolution", "128"),
    *("--text_image_linking", "control"),
    "--disable_flashattention",
    "--train_image_encoder",
    *("--image_encoder_trainable_layers", "2"),
    *("--reference_attribute_types", "hair_uppercloth_bottomcloth"),
    "--mask_loss",
    "--attribute_loc",
    *("--attribute_loc_weight", "1e-3"),
    *("--attribute_localization_loss", "balanced_l1"),
    *("--resume_from_checkpoint", "latest"),
)

# What is appended, so that tiny models learn on a CPU within minutes. The last value of a flag counts.
LEARNING_FLAGS = (
    *("--lr", "1e-3"),
    *("--lr_scheduler", "cosine"),
    *("--lr_warmup_steps", "20"),
    *("--train_batch_size", "16"),
    *("--mask_loss_prob", "0.5"),
    *("--attribute_loc_weight", "0.2"),
    *("--uncondition_prob", "0.1"),
    *("--seg_map_interpolation", "nearest"),
    *("--mixed_precision", "no"),
    *("--dataloader_num_workers", "0"),
    *("--checkpointing_steps", "100"),
)
UPDATES, IDS = 300, 150
RANDOM_FLAGS = ("--lr", "4e-3", "--mask_loss_prob", "0.25")  # the background must be learnt, too
UNET_WIDTH = 32  # the default of dp-make-tiny cannot learn to paint
COLOURLESS = "colourless"


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    args = _parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        _make_world(out, args)
        _find_models(out, args)
        _train(out, args)
        numbers = _examine(out, args)
        _generate(out, args)
        colours = _judge(out, args, numbers)
        _annotate(out)
    except StepFailed as failure:
        return failure.status
    _conclude(out, numbers, colours, time.perf_counter() - started)
    return 0


def _make_world(out: Path, args: argparse.Namespace) -> None:
    from tbps_world.cli import synth_main
    from tbps_world.toys.dp_colours import leave_out_colours, make_pool

    size = ["--preset", args.preset, "--ids", str(args.ids)]
    call("tbps-synth", synth_main, ["--out", str(out / "world"), *size, "--layouts", "dp"])
    leave_out_colours(out / "world" / "dp", out / COLOURLESS)
    make_pool(out / "world" / "dp", out / "pool")


def _find_models(out: Path, args: argparse.Namespace) -> None:
    """Put the models where the paper's command looks for them: start weights, or random ones."""
    from tbps_world.cli import dp_tiny_main

    places = [out / BASE_MODEL, out / IMAGE_ENCODER]
    if args.start != RANDOM:
        for name, place in zip(("diffusion", "image_encoder"), places):
            link_start(name, args.start, place)
    elif not all(place.is_dir() for place in places):
        arguments = [
            *(str(out), "--lexicon", str(out / "world" / "lexicon.txt"), "--vae_images", str(out / "world" / "dp")),
            *("--vae_updates", str(args.vae_updates), "--vae_resolution", str(args.resolution)),
            *("--unet_width", str(UNET_WIDTH)),
        ]
        call("dp-make-tiny", dp_tiny_main, arguments)


def train_arguments(updates: int, resolution: int, more: Sequence[str] = ()) -> list[str]:
    """The README's flags with the toy's folders, then everything appended to them; run in the toy's folder."""
    return [
        *README_FLAGS,
        *("--dataset_name", COLOURLESS, "--logging_dir", "logs", "--output_dir", "editor"),
        *LEARNING_FLAGS,
        *more,
        *("--max_train_steps", str(updates), "--resolution", str(resolution)),
    ]


def _train(out: Path, args: argparse.Namespace) -> None:
    """The paper's command through `accelerate launch`; it goes on by itself with `--resume_from_checkpoint latest`."""
    launcher = ["accelerate.commands.launch", "--mixed_precision=bf16"]
    shown = ["accelerate", "launch", *launcher[1:], "train.py"]
    arguments = train_arguments(args.updates, args.resolution, RANDOM_FLAGS if args.start == RANDOM else ())
    _run(out, [sys.executable, "-m", *launcher, *_script("train")], arguments, shown)


def _examine(out: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Losses and attention on test images, of the start and of the trained model: `before` and `after`."""
    from dp_gen.data import DiversePersonDataset
    from dp_gen.model import DiversePersonPipeline
    from dp_gen.model.parts import load_training_scheduler
    from dp_gen.options import parse_args
    from tbps_world.toys.dp_attention import draw_attention, examine, untrained

    flags = parse_args(train_arguments(args.updates, args.resolution))
    flags.pretrained_model_hf, flags.image_encoder_hf = str(out / BASE_MODEL), str(out / IMAGE_ENCODER)
    flags.uncondition_prob = 0.0  # every sample is examined with its caption
    pipeline = DiversePersonPipeline.from_pretrained(out / "editor")
    dataset = DiversePersonDataset(out / COLOURLESS, pipeline.tokenizer, flags, "test")
    scheduler = load_training_scheduler(flags)
    reports = {
        "before": examine(untrained(flags, flags.seed), dataset, scheduler),
        "after": examine(pipeline.model, dataset, scheduler),
    }
    draw_attention(out / "attention.png", reports["before"], reports["after"])
    return {when: report.numbers for when, report in reports.items()}


def _generate(out: Path, args: argparse.Namespace) -> None:
    """Edits of test images, and new persons, with garments of other test images as references."""
    from tbps_world.toys.dp_colours import POOL_LABELS

    common = ["--finetuned_model_path", "editor", "--inference_steps", str(args.inference_steps), "--seed", "0"]
    common += ["--guidance_scale", "2", "--start_merge_step", "-1"]
    edit = ["--edit_folder", COLOURLESS, "--edit_split", "test", "--reference_pool", "pool", "--strength", "1"]
    edit += ["--limit", str(args.edits)]
    command = _command("generate")
    _run(out, command, [*common, *edit, "--out", "edits"], ["python", "generate.py"])
    folder, named = out / "references", []
    folder.mkdir(exist_ok=True)
    for number, label in enumerate(POOL_LABELS):
        reference = min((out / "pool" / label).glob("*.png"))
        (folder / f"{number}.png").write_bytes(reference.read_bytes())
        phrase = " ".join(reference.stem.split("_")[1:])  # without its colour
        named.append(f"{phrase if phrase.endswith('s') else f'a {phrase}'}<|image|>")
    description = f"A person wearing {' and '.join(named)}."
    new = ["--test_description", description, "--test_reference_attribute_folder", "references"]
    _run(out, command, [*common, *new, "--num_images_per_description", "4", "--out", "new"], ["python", "generate.py"])


def _judge(out: Path, args: argparse.Namespace, numbers: Mapping[str, Any]) -> dict[str, float]:
    """Whether the edited garments have their references' colours."""
    from tbps_common.files import write_json
    from tbps_world.toys.dp_colours import colours_followed

    colours = colours_followed(out / "edits", out / COLOURLESS, out / "pool")
    write_json(out / "metrics.json", {"updates": args.updates, **numbers, "colours": colours})
    return colours


def _annotate(out: Path) -> None:
    with _practice_server() as url:
        environment = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none-needed"}
        arguments = [
            *("--origin_path", "edits/edits.jsonl", "--output_path", "annotations.jsonl", "--model", "gpt-3.5-turbo"),
            *("--TEXT_START", "0", "--TEXT_END", "-1", "--SLICE_STEP", "500"),
        ]
        _run(out, _command("annotate"), arguments, ["python", "annotate.py"], environment)


@contextmanager
def _practice_server() -> Iterator[str]:
    from tbps_world.practice.captions import answer
    from tbps_world.practice.server import PracticeServer

    with PracticeServer(answer, port=0) as server:
        yield server.url


def _script(name: str) -> list[str]:
    script = checkout_of("dp_gen") / f"{name}.py"
    return [str(script)] if script.is_file() else ["-m", f"dp_gen.{name}"]  # installed without the checkout


def _command(name: str) -> list[str]:
    return [sys.executable, *_script(name)]


def _run(
    out: Path,
    command: Sequence[str],
    arguments: Sequence[str],
    shown: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a command in the toy's folder as a process of its own; signals are the child's to handle."""
    echo([*shown, *arguments])
    # accelerate's launcher dies of a signal without telling the training it has started.
    run_child([*command, *arguments], cwd=out, env={**os.environ, **(environment or {})}, group=True)


def _conclude(
    out: Path, numbers: Mapping[str, Mapping[str, float]], colours: Mapping[str, float], seconds: float
) -> None:
    rows = (out / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    if not rows:
        raise InputError(f"{out / 'annotations.jsonl'} is empty: see the messages of annotate.py above")
    print(f"\n{'on test images':48}{'before':>10}{'after':>10}")
    for name, what in (
        ("denoise_loss", "denoising loss"),
        ("localization_loss", "localisation loss"),
        ("attention_inside", "attention inside the attribute's region (share)"),
    ):
        print(f"{what:48}{numbers['before'][name]:>10.4f}{numbers['after'][name]:>10.4f}")
    print(f"\nedited garments whose colour is nearest to that of ... among the pool's ({colours['regions']} regions)")
    for name, what in (
        ("given", "the given reference"),
        ("shuffled", "another edit's reference"),
        ("unedited", "the given reference, before the edit"),
        ("chance", "by chance"),
    ):
        print(f"  {what:46}{colours[name]:>10.1%}")
    row = json.loads(rows[0])
    print(f"\noriginal caption:  {row['base_description']}")
    print(f"attributes put in: {', '.join(row['reference_attribute_list'])}")
    print(f"new caption:       {row['output']}")
    print(f"\n{seconds / 60:.1f} minutes. Results:")
    for name, what in (
        ("attention.png", "where each attribute's token looks, before and after the training"),
        ("metrics.json", "the numbers above"),
        ("edits/contact_sheet.png", "edited test images"),
        ("new/contact_sheet.png", "new persons"),
        ("annotations.jsonl", "rewritten captions of the edits"),
        ("editor", "the trained model; logs: TensorBoard"),
    ):
        print(f"  {out / name}: {what}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dp-toy", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="toy", help="folder for everything that is written (default: %(default)s)")
    parser.add_argument(
        "--preset", choices=("tiny", "small", "medium"), default="small", help="kind of world (default: %(default)s)"
    )
    parser.add_argument("--ids", type=whole_number(3), default=IDS, help="persons of it (default: %(default)s)")
    add_start(parser)
    parser.add_argument(
        "--updates", type=whole_number(1), default=UPDATES, help="training updates (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, choices=(64, 128), default=128, help="side of all images (default: %(default)s)"
    )
    parser.add_argument(
        "--vae_updates",
        type=whole_number(1),
        default=VAE_UPDATES,
        help=f"updates of the VAE's training, with --start {RANDOM} (default: %(default)s)",
    )
    parser.add_argument(
        "--inference_steps", type=whole_number(1), default=20, help="steps of generation (default: %(default)s)"
    )
    parser.add_argument("--edits", type=whole_number(1), default=48, help="test images to edit (default: %(default)s)")
    return parser.parse_args(argv)
