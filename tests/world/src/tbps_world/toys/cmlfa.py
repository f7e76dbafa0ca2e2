"""`cmlfa-toy`: the paper's own commands on synthetic pedestrians with a tiny CLIP, from nothing to numbers and pictures.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import shlex
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import whole_number
from tbps_world.toys.steps import StepFailed, add_start, call, checkout_of, echo, run_child, start_weights

DESCRIPTION = """\
Draw a world of synthetic pedestrians, train a tiny model on it with the paper's own train command, test it with the
paper's own test command, and show what comes out. Needs no download and no GPU. The paper starts from OpenAI's CLIP; here
a tiny one takes its place, which tbps-train-tiny has trained on other synthetic persons.

The model is trained with --lfa_attention parts: its features depend on nothing but the image or the sentence. With
`cmlfa-toy --lfa_attention parts batch` a second one is trained the released code's way, whose features and scores
depend on the test batch, and both stand in the table at the end.
"""

# The train command of the paper's README, flag by flag, without its data folder.
README_FLAGS = (
    *("--name", "cmlfa"),
    "--img_aug",
    *("--batch_size", "64"),
    "--MLM",
    *("--loss_names", "sdm+mlm+id+itc"),
    *("--dataset_name", "CUHK-PEDES"),
)
README_FLAGS_AFTER_DATA = (
    *("--num_epoch", "150"),
    *("--id_loss_weight", "0.5"),
    *("--mlm_loss_weight", "0.5"),
)

# What is appended, so that a tiny model learns on a CPU within minutes. The last value of a flag counts. Without the MLM
# loss an epoch takes half the time: at this size the product with the 49,408 words costs more than all the rest.
LEARNING_FLAGS = (
    *("--loss_names", "sdm+id+itc"),
    *("--batch_size", "32"),
    *("--num_epoch", "40"),
    *("--text_length", "40"),
    *("--lfa_layers", "2"),
    *("--num_workers", "0"),
    *("--optimizer", "AdamW"),
    *("--temperature", "0.07"),
    *("--warmup_epochs", "1"),
    *("--lfa_dropout", "0.1"),
    *("--val_dataset", "val"),
    *("--eval_period", "5"),
    *("--log_period", "50"),
)
# The size of the trained start, and how far training moves from it.
START_FLAGS = (
    *("--img_size", "96,96"),
    *("--stride_size", "16"),
    *("--lr", "3e-4"),
    *("--num_epoch", "6"),
    *("--eval_period", "2"),
)
# With --start random. The paper's fine-tuning recipe (lr 1e-5, temperature 0.02) does not leave the plateau from there.
RANDOM_FLAGS = (*("--img_size", "128,64"), *("--stride_size", "8"), *("--lr", "1e-3"))
TINY_CLIP_FLAGS = (
    *("--width", "64"),
    *("--layers", "2"),
    *("--embed_dim", "128"),
    *("--patch", "8"),
    *("--grid", "16"),
    *("--context_length", "40"),
)
RANDOM_CLIP = "tiny_clip.pt"
# Test batches of each model: the released default and, where the result depends on it, the training batch.
TEST_BATCHES = {"parts": (512,), "batch": (512, 64)}
COLUMNS = ("R1", "R5", "R10", "mAP", "mINP")


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    flags = _parse(argv)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        _make_world(out / "world", flags.preset)
        start = start_weights("clip", flags.start)
        clip = out / RANDOM_CLIP if start is None else start / "clip.pt"
        if start is None:
            _make_tiny_clip(clip)
        rows = []
        for attention in flags.lfa_attention:
            arguments = train_arguments(out, attention, clip, flags.epochs)
            run_directory = _train(out, [*arguments, "--seed", str(flags.seed), *flags.more], attention)
            for batch in TEST_BATCHES[attention]:
                rows.append((attention, batch, _test(run_directory, batch)))
    except StepFailed as failure:
        return failure.status
    _conclude(out, clip, rows, time.perf_counter() - started)
    return 0


def _make_world(world: Path, preset: str) -> None:
    from tbps_world.cli import synth_main

    arguments = ["--out", str(world), "--preset", preset, "--layouts", "cuhk"]
    call("tbps-synth", synth_main, arguments)


def _make_tiny_clip(path: Path) -> None:
    from tbps_world.cli import cmlfa_tiny_main

    arguments = ["--out", str(path), *TINY_CLIP_FLAGS]
    call("cmlfa-make-tiny-clip", cmlfa_tiny_main, arguments)


def train_arguments(out: Path, attention: str, clip: Path, epochs: int | None = None) -> list[str]:
    """The README's flags with the toy's data folder, then everything appended to them.

    Args:
        out: folder of the toy.
        attention: `parts` or `batch`.
        clip: the start weights; a file named `RANDOM_CLIP` holds random ones.
        epochs: instead of the tuned number.
    """
    return [
        *README_FLAGS,
        *("--root_dir", str(out / "world")),
        *README_FLAGS_AFTER_DATA,
        *("--name", f"cmlfa_{attention}", "--output_dir", str(out / "logs")),
        *("--pretrain_choice", str(clip.resolve())),
        *LEARNING_FLAGS,
        *(RANDOM_FLAGS if clip.name == RANDOM_CLIP else START_FLAGS),
        *("--lfa_attention", attention),
        # A short run is evaluated after every epoch, or it might end without a best.pth.
        *(("--num_epoch", str(epochs), "--eval_period", "1" if epochs < 5 else "5") if epochs else ()),
    ]


def _train(out: Path, arguments: list[str], attention: str) -> Path:
    """Train, or go on with a run of the same flags; returns the run directory."""
    earlier = _newest_run(out, attention)
    if earlier is not None and (earlier / "last.pth").is_file() and _same_flags(earlier, arguments):
        arguments += ["--resume", "--resume_ckpt_file", str(earlier / "last.pth")]
    _run("train", arguments)
    directory = _newest_run(out, attention)
    if directory is None:
        raise InputError(f"the training left no run directory under {out / 'logs'}: see its messages above")
    return directory


def _newest_run(out: Path, attention: str) -> Path | None:
    found = sorted((out / "logs" / "CUHK-PEDES").glob(f"*_cmlfa_{attention}/configs.yaml"))
    return found[-1].parent if found else None


def _same_flags(run_directory: Path, arguments: list[str]) -> bool:
    from cmlfa.config import CONFIG_NAME, changed_flags, load_train_configs
    from cmlfa.options import get_args

    return not changed_flags(load_train_configs(run_directory / CONFIG_NAME), vars(get_args(arguments)))


def _test(run_directory: Path, batch: int) -> dict[str, Any]:
    from tbps_common.report.evaluation import read_evaluation

    arguments = ["--config_file", str(run_directory / "configs.yaml")]
    report = run_directory
    if batch != 512:
        report = run_directory / f"test_batch_{batch}"
        arguments += ["--test_batch_size", str(batch), "--report_dir", str(report)]
    _run("test", arguments)
    return read_evaluation(report / "evaluation.json")


def _run(name: str, arguments: list[str]) -> None:
    """Run `train.py` or `test.py` as a process of its own; signals are the child's to handle."""
    script = checkout_of("cmlfa") / f"{name}.py"
    if script.is_file():
        command = [sys.executable, str(script)]
    else:  # installed without the checkout: the console script is the same command
        command = [str(Path(sysconfig.get_path("scripts")) / f"cmlfa-{name}")]
    echo([*(("python", script.name) if script.is_file() else (f"cmlfa-{name}",)), *arguments])
    run_child([*command, *arguments])


def zero_shot(clip: Path, world: Path) -> float:
    """R@1 in percent of the start weights on the test split: what a CLIP finds that has not been trained on it."""
    import torch

    from cmlfa.search import open_clip_model
    from tbps_common.images import read_image
    from tbps_common.search.retriever import Query

    model, folder = open_clip_model(str(clip), device="cpu"), world / "CUHK-PEDES"
    records = json.loads((folder / "reid_raw.json").read_text(encoding="utf-8"))
    shown = [record for record in records if record["split"] == "test"]
    asked = [(Query(caption), record["id"]) for record in shown for caption in record["captions"]]
    parts = [shown[start : start + 50] for start in range(0, len(shown), 50)]
    with torch.inference_mode():
        pixels = (
            [model.transform(read_image(folder / "imgs" / record["file_path"])) for record in part] for part in parts
        )
        pictures = torch.cat([model.encode_images(torch.stack(part))["feature"] for part in pixels])
        sentences = torch.cat([model.encode_queries([query])["feature"] for query, _ in asked])
    people = torch.tensor([record["id"] for record in shown])
    found = people[(sentences @ pictures.T).argmax(dim=1)]
    return 100 * (found == torch.tensor([person for _, person in asked])).float().mean().item()


def _conclude(out: Path, clip: Path, rows: list[tuple[str, int, dict[str, Any]]], seconds: float) -> None:
    from prettytable import PrettyTable

    from tbps_common.files import write_json
    from tbps_common.report.pictures import cmc_curve

    table = PrettyTable(["lfa_attention", "test batch", *COLUMNS])
    curves = {}
    for attention, batch, evaluation in rows:
        metrics = evaluation["metrics"]["t2i"]
        table.add_row([attention, batch, *(f"{metrics[name]:.2f}" for name in COLUMNS)])
        curves[f"{attention}, test batch {batch}"] = evaluation["cmc"]["t2i"]
    counts = rows[0][2]["counts"]
    print(f"\ntext-to-image retrieval, {counts['queries']} captions, {counts['gallery']} images:\n{table}")
    start = zero_shot(clip, out / "world")
    print(f"R@1 of the CLIP that the training started from: {start:.2f}")
    if any(attention == "batch" for attention, _, _ in rows):
        print(
            "With --lfa_attention batch (released code) a feature depends on the other samples of its batch: the same "
            "weights give another result at another --test_batch_size."
        )
    write_json(out / "metrics.json", [{**evaluation, "start_R1": start} for _, _, evaluation in rows])
    cmc_curve(out / "cmc.png", curves, title="CMLFA on synthetic pedestrians")
    first_run = Path(rows[0][2]["checkpoint"]).parent
    shutil.copyfile(first_run / "ranked_list.png", out / "ranked_list.png")
    print(f"\n{seconds / 60:.1f} minutes. Results:")
    for name, what in (
        ("metrics.json", "all metrics"),
        ("cmc.png", "CMC curves"),
        ("ranked_list.png", f"what six captions find ({rows[0][0]})"),
    ):
        print(f"  {out / name}: {what}")
    print("\nSearch the test images for your own person:")
    index = out / "people.lance"
    config = first_run / "configs.yaml"
    images = out / "world" / "CUHK-PEDES" / "imgs"
    sentence = "A man in a red jacket and blue jeans."
    for command in (
        ["cmlfa-index", "--config_file", str(config), "--images", str(images), "--out", str(index)],
        ["cmlfa-search", "--config_file", str(config), "--index", str(index), "--text", sentence],
    ):
        print(f"  {shlex.join(command)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cmlfa-toy", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="toy", help="folder for everything that is written (default: %(default)s)")
    parser.add_argument(
        "--preset",
        choices=("tiny", "small", "medium"),
        default="small",
        help="size of the world (default: %(default)s)",
    )
    add_start(parser)
    parser.add_argument("--seed", type=whole_number(0), default=1, help="of the training (default: %(default)s)")
    parser.add_argument(
        "--more",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="flags to append to the training command, as in --more='--lr 1e-4'",
    )
    parser.add_argument("--epochs", type=whole_number(1), help="epochs of each model instead of the tuned number")
    parser.add_argument(
        "--lfa_attention",
        nargs="+",
        choices=("parts", "batch"),
        default=["parts"],
        help="models to train, one after the other (default: parts)",
    )
    return parser.parse_args(argv)
