"""`mra-toy`: the paper's own commands on synthetic pedestrians with tiny networks, from nothing to numbers and pictures.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from mra.config import load_config
from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.toys.mra_steps import run_script, set_entry
from tbps_world.toys.steps import RANDOM, StepFailed, add_start, call, echo, start_weights

DESCRIPTION = """\
Draw a world of synthetic pedestrians, make tiny networks that start from a Swin and a BERT of tbps-train-tiny, pre-train
them on generated pictures with region phrases (--task sda), fine-tune them (--task cuhk), choose the settings of the
re-ranking on the validation persons, and evaluate the result, with the paper's own commands. Needs no download and no GPU.
"""

LAYOUTS = "cuhk,finetune,sda"
# With trained start weights; from random ones as many as the configurations of mra-make-tiny say.
EPOCHS = {"sda": 2, "cuhk": 7}
# While training; in the end the validation persons decide.
SCORE_WORLD = "16"
BEST, CHOSEN = "out/ft_cuhk/checkpoint_best.pth", "out/ft_cuhk/checkpoint_reranking.pth"
COLUMNS = ("R1", "R5", "R10", "mAP", "mINP")


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    flags = _parse(argv)
    out = Path(flags.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    started = time.perf_counter()
    try:
        _make_world(out, flags.preset)
        taught = _make_tiny(out, flags.networks, flags.start)
        if flags.no_regions:
            set_entry(out, "sda", "region", 0)
        sda, cuhk = _epochs(out, taught, flags)
        pretrained = f"out/pre_sda/checkpoint_{sda - 1}.pth" if sda else _unpretrained(out)
        if sda:
            _train(out, "sda", sda, flags.seed, ["--select", "val"])
        more = ["--checkpoint", pretrained, "--select", "val", "--score_world", SCORE_WORLD]
        _train(out, "cuhk", cuhk, flags.seed, more)
        _evaluate(out)
    except StepFailed as failure:
        return failure.status
    _conclude(out, time.perf_counter() - started)
    return 0


def _make_world(out: Path, preset: str) -> None:
    from tbps_world.cli import synth_main

    call("tbps-synth", synth_main, ["--out", str(out), "--preset", preset, "--layouts", LAYOUTS])


def _make_tiny(out: Path, networks: str, start: str) -> bool:
    """Returns whether the networks start from trained weights."""
    from tbps_world.cli import mra_tiny_main

    lexicon = str(out / "lexicon.txt")
    call("mra-make-tiny", mra_tiny_main, ["--out", str(out), "--lexicon", lexicon, "--preset", networks])
    weights = start_weights("swin_bert", RANDOM if networks == "tiny" else start)
    if weights is None:
        return False
    echo(["cp", "-r", f"{weights}/*", str(out / "data")])
    shutil.copytree(weights, out / "data", dirs_exist_ok=True)
    return True


def _epochs(out: Path, taught: bool, flags: argparse.Namespace) -> tuple[int, int]:
    """Epochs of pre-training and fine-tuning."""
    own = {task: load_config(out / f"configs/{task}.yaml")["schedular"]["epochs"] for task in EPOCHS}
    usual = EPOCHS if taught else own
    given = flags.sda_epochs, flags.cuhk_epochs
    return (
        usual["sda"] if given[0] is None else given[0],
        usual["cuhk"] if given[1] is None else given[1],
    )


def _unpretrained(out: Path) -> str:
    """A checkpoint of the start weights as they are; returns its name."""
    from mra.model import Retrieval
    from tbps_common.datasets import read_json
    from tbps_common.run.checkpoint import save_checkpoint

    config = load_config(out / "configs/sda.yaml")
    vision = read_json(out / config["vision_config"])
    vision["ckpt"] = str(out / vision["ckpt"])
    places = {"text_config": str(out / config["text_config"]), "text_encoder": str(out / config["text_encoder"])}
    model = Retrieval({**config, **places, "vision_config": vision})
    save_checkpoint({"model": dict(model.state_dict()), "config": config}, out / "data/checkpoint/start.pth")
    return "data/checkpoint/start.pth"


def _train(out: Path, task: str, epochs: int, seed: int, more: list[str]) -> None:
    """Train, or go on with what an earlier call has begun."""
    folder = f"out/{'pre' if task == 'sda' else 'ft'}_{task}"
    arguments = ["--task", task, "--dist", "f4", "--output_dir", folder, *more, "--num_workers", "1"]
    arguments += ["--epo", str(epochs), "--seed", str(seed)]
    if (out / folder / "last.pth").is_file():
        arguments.append("--resume")
    run_script(out, arguments)


def _evaluate(out: Path) -> None:
    from tbps_common.files import write_json
    from tbps_world.toys.mra_reranking import choose_reranking

    if not (out / BEST).is_file():
        raise InputError(f"the training left no {out / BEST}, as no epoch found a single person: train for more epochs")
    choice = choose_reranking(out, out / BEST, out / CHOSEN)
    print(f"chosen: k_test {choice.k_test} (now in {out / 'configs/cuhk.yaml'}), --score_world {choice.score_world}")
    write_json(out / "reranking.json", dataclasses.asdict(choice))
    arguments = ["--task", "cuhk", "--dist", "f4", "--output_dir", "out/eval_cuhk", "--checkpoint", CHOSEN]
    arguments += ["--score_world", str(choice.score_world)]
    run_script(out, [*arguments, "--evaluate", "--report", "--num_workers", "1"])


def _conclude(out: Path, seconds: float) -> None:
    from prettytable import PrettyTable

    from tbps_common.datasets import load_processed_eval
    from tbps_common.files import write_json
    from tbps_common.report.evaluation import read_evaluation

    evaluation = read_evaluation(out / "out/eval_cuhk/evaluation_test.json")
    stages = {
        "similarity alone (ITC)": evaluation["metrics"]["t2i_similarity_only"],
        "re-ranked (ITM)": evaluation["metrics"]["t2i"],
    }
    chance = chance_of_first_rank(load_processed_eval(out / "data/finetune/cuhk_test.json", "images"))
    table = PrettyTable(["stage", *COLUMNS])
    for stage, metrics in stages.items():
        table.add_row([stage, *(f"{metrics[name]:.2f}" for name in COLUMNS)])
    table.add_row(["chance", f"{chance:.2f}", *[""] * (len(COLUMNS) - 1)])
    counts = evaluation["counts"]
    print(f"\ntext-to-image retrieval, {counts['queries']} captions, {counts['gallery']} images:\n{table}")
    first = [metrics["R1"] for metrics in stages.values()]
    print(f"R@1: ITC stage {first[0]:.2f} %, after re-ranking {first[1]:.2f} %, chance {chance:.2f} %")
    write_json(out / "metrics.json", {"stages": stages, "chance_R1": chance, "seconds": seconds})
    print(f"\n{seconds / 60:.1f} minutes. Results:")
    print(f"  {out / 'metrics.json'}: all metrics")
    print(f"  {out / 'out/eval_cuhk'}: evaluation, CMC curves and what six captions find")


def chance_of_first_rank(data: Any) -> float:
    """R@1, in percent, of a random order: the mean share of the gallery that shows the caption's person."""
    images: dict[int, int] = {}
    for person in data.g_pids:
        images[person] = images.get(person, 0) + 1
    shares = [images.get(person, 0) / len(data.g_pids) for person in data.q_pids]
    return 100 * sum(shares) / len(shares)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mra-toy", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="toy", help="folder for everything that is written")
    parser.add_argument("--preset", choices=("tiny", "small", "medium"), default="small", help="size of the world")
    parser.add_argument(
        "--networks",
        choices=("tiny", "toy"),
        default="toy",
        help="sizes that mra-make-tiny writes; tiny starts from random weights and learns nothing",
    )
    add_start(parser)
    parser.add_argument("--sda_epochs", type=whole_number(0), metavar="N", help="epochs of the pre-training; 0: none")
    parser.add_argument("--no_regions", action="store_true", help="pre-train without the region loss")
    parser.add_argument("--seed", type=whole_number(0), default=42, help="of both trainings")
    parser.add_argument("--cuhk_epochs", type=whole_number(1), metavar="N", help="epochs of the fine-tuning")
    return parser.parse_args(argv)
