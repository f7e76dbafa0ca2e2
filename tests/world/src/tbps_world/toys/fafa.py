"""`fafa-toy`: the paper's own commands on synthetic pedestrians with a tiny model, from nothing to numbers and pictures.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import shlex
import shutil
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.toys.steps import StepFailed, call, checkout_of, echo, run_child

DESCRIPTION = """\
Draw a world of synthetic pedestrians, train a tiny model on it with the paper's own training command, evaluate it with
the paper's own inference command, and show what comes out. Needs no download and no GPU.
"""

# The training command of the paper's README, flag by flag, after its data folders.
README_FLAGS = (
    *("--json-path", "SynCPR.json"),
    *("--exp-name", "FAFA_SynCPR_FDA_FD_MFR"),
    *("--blip-model-name", "blip2_fafa_cpr"),
    *("--setting", "annotations"),
    *("--num-epochs", "10"),
    *("--num-workers", "4"),
    *("--learning-rate", "2e-6"),
    *("--batch-size", "256"),
    *("--transform", "squarepad"),
    "--save-training",
    "--save-best",
    *("--validation-frequency", "1"),
    *("--validation-step", "500"),
    *("--loss-fda", "1.0"),
    *("--loss-fd", "1.0"),
    *("--loss-mfr", "0.5"),
    *("--fda-k", "6"),
    *("--fda-alpha", "0.5"),
    *("--fd-margin", "0.5"),
)
# What is appended, so that a model of random weights learns on a CPU within minutes. The last value of a flag counts.
EPOCHS = 60
LEARNING_FLAGS = (
    *("--num-workers", "1"),
    *("--learning-rate", "1e-3"),
    *("--batch-size", "32"),
    # Random features are easiest to predict when they are all the same: at 0.5 MFR holds them together for long.
    *("--loss-mfr", "0.05"),
    *("--validation-frequency", "10"),
    *("--eval-num-workers", "1"),
    *("--seed", "0"),
    "--save-last",
    "--no-code-backup",
)
WORLD_FLAGS = ("--preset", "small", "--ids", "1100", "--height", "384", "--format", "jpg", "--layouts", "syncpr,itcpr")
COLUMNS = ("R1", "R5", "R10", "mAP")
MODEL_NAME = "tuned_last_recall_at1.pt"


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    flags = _parse(argv)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        _make_world(out, flags.ids)
        _make_model(out)
        run = _train(out, flags)
        _infer(out, run, flags.device)
    except StepFailed as failure:
        return failure.status
    _conclude(out, run, time.perf_counter() - started)
    return 0


def _make_world(out: Path, ids: int | None) -> None:
    from tbps_world.cli import synth_main

    arguments = ["--out", str(out / "world"), *WORLD_FLAGS, *(("--ids", str(ids)) if ids else ())]
    call("tbps-synth", synth_main, arguments)


def _make_model(out: Path) -> None:
    from tbps_world.cli import fafa_tiny_main

    arguments = [str(out / "model"), "--for", "pedestrians"]
    call("fafa-make-tiny", fafa_tiny_main, arguments)


def train_arguments(out: Path, *, epochs: int | None = None, device: str = "cpu") -> list[str]:
    """The README's flags with the toy's data folders, then everything appended to them."""
    return [
        *("--dataset", "cpr"),
        *("--syncpr-data-path", str(out / "world" / "SynCPR")),
        *("--itcpr-root", str(out / "world" / "ITCPR")),
        *README_FLAGS,
        *("--backbone", str(out / "model" / "tiny.yaml")),
        *("--exp-name", "toy", "--output-dir", str(out / "runs")),
        *("--num-epochs", str(epochs or EPOCHS)),
        *LEARNING_FLAGS,
        *("--device", device),
    ]


def _train(out: Path, flags: argparse.Namespace) -> Path:
    """Train, or go on with the run that was stopped; returns the run directory."""
    arguments = train_arguments(out, epochs=flags.epochs, device=flags.device)
    earlier = _newest_run(out)
    if earlier is not None and (earlier / "training_state" / "last.pt").is_file() and _same_flags(earlier, arguments):
        arguments += ["--resume", str(earlier)]
    _run("src/blip_fine_tune_new.py", "fafa-train", arguments)
    directory = _newest_run(out)
    if directory is None:
        raise InputError(f"the training left no run directory under {out / 'runs'}: see its messages above")
    return directory


def _newest_run(out: Path) -> Path | None:
    found = sorted((out / "runs").glob("*_toy/flags.json"))
    return found[-1].parent if found else None


def _same_flags(run: Path, arguments: list[str]) -> bool:
    from fafa.options import get_args

    return json.loads((run / "flags.json").read_text(encoding="utf-8")) == vars(get_args(arguments))


def _infer(out: Path, run: Path, device: str) -> None:
    arguments = ["--exp-dir", str(run), "--model-name", MODEL_NAME, "--itcpr-root", str(out / "world" / "ITCPR")]
    arguments += ["--batch-size", "256", "--num-workers", "1", "--device", device]
    arguments += ["--fda-k-sweep", "1", "2", "4", "6", "8", "16"]
    _run("inference_fafa.py", "fafa-infer", arguments)


def _run(script_name: str, command_name: str, arguments: list[str]) -> None:
    """Run a script of the package as a process of its own; signals are the child's to handle."""
    script = checkout_of("fafa") / script_name
    if script.is_file():
        command = [sys.executable, str(script)]
        echo(["python", script_name, *arguments])
    else:  # installed without the checkout: the console script is the same command
        command = [str(Path(sysconfig.get_path("scripts")) / command_name)]
        echo([command_name, *arguments])
    run_child([*command, *arguments])


def chance_of_first(itcpr: Any) -> float:
    """R@1 in percent of a gallery in random order: the mean share of images that answer a query."""
    answers = Counter(itcpr.gallery["instance_ids"])
    total = len(itcpr.gallery["instance_ids"])
    shares = [answers[instance] / total for instance in itcpr.query["instance_ids"]]
    return 100 * sum(shares) / len(shares)


def _conclude(out: Path, run: Path, seconds: float) -> None:
    from tbps_common.datasets import ITCPR
    from tbps_common.files import write_json
    from tbps_common.report.evaluation import read_evaluation

    evaluation = read_evaluation(run / "evaluation.json")
    metrics = evaluation["metrics"]["com"]
    chance = chance_of_first(ITCPR(out / "world" / "ITCPR", verbose=False))
    counts = evaluation["counts"]
    print(f"\ncomposed retrieval, {counts['queries']} queries, {counts['gallery']} gallery images:")
    print("  " + "  ".join(f"{name} {metrics[name]:.2f}" for name in COLUMNS))
    print(f"  R@1 by chance: {chance:.2f}; the model's is {metrics['R1'] / chance:.1f} times as high")
    write_json(out / "metrics.json", {**evaluation, "chance_R1": chance})
    for name in ("cmc.png", "ranked_list.png"):
        shutil.copyfile(run / name, out / name)
    print(f"\n{seconds / 60:.1f} minutes. Results:")
    for name, what in (
        ("metrics.json", "all metrics"),
        ("cmc.png", "CMC curve"),
        ("ranked_list.png", "what six queries find"),
    ):
        print(f"  {out / name}: {what}")
    print("\nSearch the gallery with a picture and your own sentence:")
    index = str(out / "people.lance")
    run_flags = ["--exp-dir", str(run), "--model-name", MODEL_NAME]
    picture = ITCPR(out / "world" / "ITCPR", verbose=False).query["img_paths"][0]
    for command in (
        ["fafa-index", *run_flags, "--images", str(out / "world" / "ITCPR"), "--out", index],
        ["fafa-search", *run_flags, "--index", index, "--image", picture, "--text", "Wearing a red coat."],
    ):
        print(f"  {shlex.join(command)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fafa-toy", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="toy", help="folder for everything that is written")
    parser.add_argument("--ids", type=whole_number(3), help="identities of the world instead of the tuned number")
    parser.add_argument("--epochs", type=whole_number(1), help="epochs instead of the tuned number")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    return parser.parse_args(argv)
