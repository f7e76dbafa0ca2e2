"""`diana-toy`: the paper's own scripts on synthetic pedestrians with tiny towers, from nothing to numbers and pictures.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.toys.steps import StepFailed, add_start, call, checkout_of, echo, run_child, start_weights

DESCRIPTION = """\
Draw a world of synthetic pedestrians with captions and dialogues, take the tiny towers of tbps-train-tiny, and run the
paper's three scripts on them: shell/pretrain.sh, shell/finetune.sh and shell/eval.sh, with flags for the size of a laptop.
Needs no download and no GPU. At the end: R@1 after every round of the dialogue, and the commands for a chat.
"""
# Towers that are large enough to learn and small enough for a laptop.
TINY_FLAGS = (
    *("--vocab_size", "950"),
    *("--image_size", "128", "64"),
    *("--patch_size", "8"),
    *("--embed_dim", "48"),
    *("--depths", "2", "2"),
    *("--num_heads", "4", "8"),
    *("--window_size", "8"),
    # With the released 50, towers that do not know each other make all features equal before anything is learnt.
    *("--logit_scale", "10"),
)
SIZE_FLAGS = (
    *("--force_image_size", "128", "64"),
    *("--num_query", "4"),
    *("--dataloader_num_workers", "0"),
    *("--grad_checkpointing", "off"),
)
# The released rates are for towers of 1.3 billion parameters.
LEARNING_FLAGS = (
    *("--learning_rate", "1e-3"),
    *("--enable_sdm", "False"),
    *("--mask_probability", "0"),
    *("--drop_path_rate", "0"),
    *("--deepspeed", ""),
    *("--logging_steps", "25"),
)
STAGE_FLAGS = {
    "pretrain": ("--lr_scheduler_type", "constant_with_warmup"),
    "finetune": ("--save_total_limit", "1"),
}
# Of both stages: epochs, and steps until the learning rate is reached; from start weights and from random ones.
TAUGHT, UNTAUGHT = {"pretrain": 5, "finetune": 9, "warmup": 30}, {"pretrain": 22, "finetune": 26, "warmup": 100}
BATCH_SIZE = 32
MOST_THREADS = 4
TURNS = ("1", "2", "3", "4", "5")
_SETTINGS_NAME = "toy.json"


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    from tbps_world.cli import diana_tiny_main, synth_main

    flags = _parse(argv)
    out = Path(flags.out).resolve()
    layout = _layout()
    _remember(out, {name: value for name, value in vars(flags).items() if name != "out"})
    started = time.perf_counter()
    try:
        call(
            "tbps-synth",
            synth_main,
            ["--out", str(out / "world"), "--preset", flags.preset, "--layouts", "chatpedes,mals"],
        )
        towers = start_weights("swin_llama", flags.start)
        taught = towers is not None
        if towers is None:
            towers = out / "tiny"
            if not (towers / "configs" / "config.json").is_file():
                call("diana-make-tiny", diana_tiny_main, ["--out", str(towers), *TINY_FLAGS])
        for stage, steps in (("pretrain", flags.pretrain_steps), ("finetune", flags.finetune_steps)):
            if not (out / stage / "model.safetensors").is_file():
                appended = stage_flags(stage, TAUGHT if taught else UNTAUGHT, steps)
                appended += ["--seed", str(flags.seed), "--enable_refiner", str(not flags.no_refiner)]
                _script(layout, stage, environment(out, stage, towers), appended)
        _script(
            layout,
            "eval",
            environment(out, "eval", towers),
            ["--num_workers", "0", "--mode", "global" if flags.no_refiner else "all", "--turn_limit", *TURNS],
        )
    except StepFailed as failure:
        return failure.status
    _conclude(out, time.perf_counter() - started)
    return 0


def environment(out: Path, stage: str, towers: Path) -> dict[str, str]:
    """Variables of the scripts; `towers` holds what the training starts from."""
    return {
        "DIANA_DATA_ROOT": str(out / "world"),
        "VISION_PRETRAINED": str(towers / "swinv2-tiny"),
        "LLAMA_PRETRAINED": str(towers / "llama-tiny"),
        "CONFIG_DIR": str(towers / "configs"),
        "PRETRAINED": str(out / ("finetune" if stage == "eval" else "pretrain")),
        "OUTPUT_DIR": str(out / ("evaluation" if stage == "eval" else stage)),
        "GPUS": "1",
        "BATCH_SIZE": str(BATCH_SIZE),
    }


def stage_flags(stage: str, schedule: Mapping[str, int], steps: int | None) -> list[str]:
    """What is appended to a training script: `schedule` is `TAUGHT` or `UNTAUGHT`, and `steps` ends it sooner."""
    return [
        *SIZE_FLAGS,
        *LEARNING_FLAGS,
        *STAGE_FLAGS[stage],
        *("--num_train_epochs", str(schedule[stage])),
        *("--warmup_steps", str(schedule["warmup"])),
        *(("--max_steps", str(steps)) if steps else ()),
        # A stopped toy goes on from its last checkpoint.
        *("--overwrite_output_dir", "False"),
    ]


def _layout() -> Path:
    """The folder with `train/shell` and `eval/shell`."""
    folder = checkout_of("diana") / "DiaNA"
    if not (folder / "train" / "shell" / "pretrain.sh").is_file():
        raise InputError("the toy runs the scripts of the checkout: clone the repository and call it from there")
    return folder


def _remember(out: Path, settings: dict[str, Any]) -> None:
    from tbps_common.files import write_json

    file = out / _SETTINGS_NAME
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier != settings:
            raise InputError(f"{out} holds a toy run of other settings ({earlier}): give another --out")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} holds other files: give an empty or new folder as --out")
    write_json(file, settings)


def _script(layout: Path, stage: str, variables: dict[str, str], arguments: Sequence[str]) -> None:
    """Run a shell script as a user does; signals are the child's to handle."""
    folder = layout / ("eval" if stage == "eval" else "train")
    words = ["bash", f"shell/{stage}.sh", *arguments]
    echo([*(f"{name}={value}" for name, value in variables.items()), *words], folder)
    # The scripts themselves take one thread, as one process of many; here there is no other.
    threads = str(min(os.cpu_count() or 1, MOST_THREADS))
    run_child(words, cwd=folder, env={"PYTHON": sys.executable, "OMP_NUM_THREADS": threads, **os.environ, **variables})


def _conclude(out: Path, seconds: float) -> None:
    from prettytable import PrettyTable

    results = json.loads((out / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    table = PrettyTable(["rounds", *results[0]["metrics"]])
    for entry in results:
        table.add_row([entry["turn_limit"], *(f"{metrics['r1']:.2f}" for metrics in entry["metrics"].values())])
    chance = chance_r1(out / "world" / "ChatPedes" / "test_reid.json")
    images, queries = results[0]["num_images"], results[0]["num_queries"]
    print(f"\nR@1 by rounds of the dialogue ({queries} dialogues, {images} pictures, chance {chance:.2f}):\n{table}")
    print(f"\n{seconds / 60:.1f} minutes. Results in {out / 'evaluation'}: metrics.json, turns.png, ranked_list.png")
    print("\nSearch the pictures in a conversation:")
    index, model = out / "people.lance", out / "finetune"
    images_folder = out / "world" / "ChatPedes" / "imgs"
    for words in (
        [
            "diana-index",
            "--pretrained",
            str(model),
            "--images",
            str(images_folder),
            "--out",
            str(index),
            "--mode",
            "all",
        ],
        ["diana-chat", "--pretrained", str(model), "--index", str(index)],
    ):
        print(f"  {shlex.join(words)}")


def chance_r1(annotations: Path) -> float:
    """R@1 in percent of a ranking by chance: the mean share of right pictures over the queries."""
    records = json.loads(annotations.read_text(encoding="utf-8"))
    count: dict[Any, int] = {}
    for record in records:
        count[record["id"]] = count.get(record["id"], 0) + 1
    shares = []
    for record in records:
        dialogues = 1 if isinstance(record["chats"][0][0], dict) else len(record["chats"])
        shares += [count[record["id"]] / len(records)] * dialogues
    return 100 * sum(shares) / len(shares)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diana-toy", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="toy", metavar="DIR", help="folder for everything that is written")
    add("--preset", choices=("tiny", "small", "medium"), default="small", help="size of the world")
    add_start(parser)
    add("--no_refiner", action="store_true", help="train without the attribute refiner")
    add("--seed", type=whole_number(0), default=42, help="of both trainings")
    add("--pretrain_steps", type=whole_number(1), metavar="N", help="stop pre-training after N steps")
    add("--finetune_steps", type=whole_number(1), metavar="N", help="stop fine-tuning after N steps")
    return parser.parse_args(argv)
