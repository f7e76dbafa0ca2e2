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
from tbps_world.toys.steps import RANDOM, StepFailed, add_start, call, checkout_of, echo, run_child, start_weights

DESCRIPTION = """\
Draw a world of synthetic pedestrians, train a tiny model on it with the paper's own training command, evaluate it with
the paper's own inference command, and show what comes out. Needs no download and no GPU. The paper starts from BLIP-2;
here a tiny one takes its place, which tbps-train-tiny has trained on single pictures of other synthetic persons. Beside
the result stands what these start weights find with the picture alone, the sentence alone, and the sum of both.
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
# What is appended, so that a tiny model learns on a CPU within minutes. The last value of a flag counts.
LEARNING_FLAGS = (
    *("--num-workers", "1"),
    *("--batch-size", "32"),
    *("--validation-frequency", "10"),
    *("--eval-num-workers", "1"),
    "--save-last",
    "--no-code-backup",
)
EPOCHS = 10
START_FLAGS = (
    *("--learning-rate", "5e-4"),
    # The start weights know pictures that were squashed to a square, not padded.
    *("--transform", "resize"),
    *("--loss-mfr", "0.05"),
)
# With --start random: random features are easiest to predict when they are all the same; at 0.5 MFR holds them together
# for long.
RANDOM_FLAGS = (*("--learning-rate", "1e-3"), *("--loss-mfr", "0.05"))
RANDOM_EPOCHS = 60
WORLD_FLAGS = ("--preset", "small", "--ids", "1100", "--format", "jpg", "--layouts", "syncpr,itcpr")
START_SIZE, RANDOM_SIZE = ("--height", "192"), ("--height", "384")
OVERFIT = 32
OVERFIT_EPOCHS = 150
COLUMNS = ("R1", "R5", "R10", "mAP")
RANDOM_MODEL = "model"
MODEL_NAME = "tuned_last_recall_at1.pt"


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    flags = _parse(argv)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        _make_world(out, flags.ids, flags.start)
        backbone = _make_model(out, flags.start)
        arguments = train_arguments(out, backbone, epochs=flags.epochs, device=flags.device)
        arguments += ["--seed", str(flags.seed), *flags.more]
        checked = _check_overfit(out, arguments, flags.device) if flags.overfit else None
        run = _train(out, arguments)
        _infer(run, out / "world" / "ITCPR", flags.device)
    except StepFailed as failure:
        return failure.status
    _conclude(out, run, backbone, checked, time.perf_counter() - started)
    return 0


def _make_world(out: Path, ids: int | None, start: str) -> None:
    from tbps_world.cli import synth_main

    size = RANDOM_SIZE if start == RANDOM else START_SIZE
    call(
        "tbps-synth",
        synth_main,
        ["--out", str(out / "world"), *WORLD_FLAGS, *size, *(("--ids", str(ids)) if ids else ())],
    )


def _make_model(out: Path, start: str) -> Path:
    """The model's description, for `--backbone`."""
    from tbps_world.cli import fafa_tiny_main

    trained = start_weights("blip2", start)
    if trained is not None:
        return trained / "tiny.yaml"
    call("fafa-make-tiny", fafa_tiny_main, [str(out / RANDOM_MODEL), "--for", "pedestrians"])
    return out / RANDOM_MODEL / "tiny.yaml"


def train_arguments(out: Path, backbone: Path, *, epochs: int | None = None, device: str = "cpu") -> list[str]:
    """The README's flags with the toy's data folders, then everything appended to them.

    Args:
        out: folder of the toy.
        backbone: description of the model; in a folder named `RANDOM_MODEL` it is one of random weights.
        epochs: instead of the tuned number.
        device: of `--device`.
    """
    random = backbone.parent.name == RANDOM_MODEL
    return [
        *("--dataset", "cpr"),
        *("--syncpr-data-path", str(out / "world" / "SynCPR")),
        *("--itcpr-root", str(out / "world" / "ITCPR")),
        *README_FLAGS,
        *("--backbone", str(backbone)),
        *("--exp-name", "toy", "--output-dir", str(out / "runs")),
        *("--num-epochs", str(epochs or (RANDOM_EPOCHS if random else EPOCHS))),
        *LEARNING_FLAGS,
        *(RANDOM_FLAGS if random else START_FLAGS),
        *("--device", device),
    ]


def _check_overfit(out: Path, arguments: list[str], device: str) -> float:
    """R@1 in percent on the triplets trained on, if there are only a few: whether the model can learn them at all."""
    from tbps_common.files import write_json
    from tbps_common.report.evaluation import read_evaluation

    root, few = out / "world" / "SynCPR", out / "overfit"
    by_change = {record["cpr_id"]: record for record in json.loads((root / "SynCPR.json").read_text(encoding="utf-8"))}
    records = list(by_change.values())[:OVERFIT]
    write_json(few / "SynCPR.json", records)
    sides: dict[str, list[dict[str, Any]]] = {"reference": [], "target": []}
    for number, record in enumerate(records):
        for side, found in sides.items():
            name = record[f"{side}_image_path"]
            (few / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, few / name)
            found.append({"file_path": name, "datasets": "SynCPR", "person_id": number, "instance_id": number + 1})
        sides["reference"][-1]["caption"] = record["edit_caption"]
    write_json(few / "query.json", sides["reference"])
    write_json(few / "gallery.json", sides["target"])
    length = ["--num-epochs", str(OVERFIT_EPOCHS), "--validation-frequency", str(OVERFIT_EPOCHS)]
    folders = ["--syncpr-data-path", str(few), "--itcpr-root", str(few), "--output-dir", str(few / "runs")]
    run = _train(few, [*arguments, *length, *folders])
    _infer(run, few, device)
    return read_evaluation(run / "evaluation.json")["metrics"]["com"]["R1"]


def _train(out: Path, arguments: list[str]) -> Path:
    """Train, or go on with the run that was stopped; returns the run directory."""
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


def _infer(run: Path, itcpr: Path, device: str) -> None:
    arguments = ["--exp-dir", str(run), "--model-name", MODEL_NAME, "--itcpr-root", str(itcpr)]
    arguments += ["--batch-size", "256", "--num-workers", "1", "--device", device]
    arguments += ["--fda-k-sweep", "1", "2", "4", "6", "8", "12"]
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


def baselines(backbone: Path, itcpr: Any) -> dict[str, float]:
    """R@1 in percent of the start weights, which have seen no triplet: with half of a query, with both, and fused."""
    import torch
    from torch.nn.functional import normalize

    from fafa.losses import pool_tokens, token_similarity
    from fafa.model.fafa import load_model_and_preprocess
    from fafa.model.settings import MODEL_NAME as ARCHITECTURE
    from tbps_common.images import read_image

    model, to_pixels, clean = load_model_and_preprocess(ARCHITECTURE, backbone, is_eval=True)
    words = [clean["eval"](caption) for caption in itcpr.query["captions"]]
    with torch.no_grad():

        def states(paths: list[str]) -> torch.Tensor:
            pixels = [to_pixels["eval"](read_image(path)) for path in paths]
            return torch.cat(
                [model.evaluation_states(torch.stack(pixels[n : n + 64])) for n in range(0, len(pixels), 64)]
            )

        asked = states(itcpr.query["img_paths"])
        gallery = model.target_features(states(itcpr.gallery["img_paths"]))
        sentence = model.extract_features({"text_input": words}, mode="text").text_embeds_proj
        assert sentence is not None
        queries = {
            "picture": normalize(model.target_features(asked).mean(dim=1), dim=1),
            "sentence": sentence[:, 0],
            "untrained": model.query_features(asked, words),
        }
        scores = {name: pool_tokens(token_similarity(query, gallery), model.fda_k) for name, query in queries.items()}
    scores["sum"] = scores["picture"] + scores["sentence"]
    wanted, there = (torch.tensor(part["instance_ids"]) for part in (itcpr.query, itcpr.gallery))
    return {name: 100 * (there[score.argmax(dim=1)] == wanted).float().mean().item() for name, score in scores.items()}


def _conclude(out: Path, run: Path, backbone: Path, overfit: float | None, seconds: float) -> None:
    from tbps_common.datasets import ITCPR
    from tbps_common.files import write_json
    from tbps_common.report.evaluation import read_evaluation

    evaluation = read_evaluation(run / "evaluation.json")
    metrics = evaluation["metrics"]["com"]
    itcpr = ITCPR(out / "world" / "ITCPR", verbose=False)
    chance, start = chance_of_first(itcpr), baselines(backbone, itcpr)
    counts = evaluation["counts"]
    print(f"\ncomposed retrieval, {counts['queries']} queries, {counts['gallery']} gallery images:")
    print("  " + "  ".join(f"{name} {metrics[name]:.2f}" for name in COLUMNS))
    print(f"  R@1 by chance: {chance:.2f}; the model's is {metrics['R1'] / chance:.1f} times as high")
    print(
        f"  R@1 of the start weights: picture alone {start['picture']:.2f}, sentence alone {start['sentence']:.2f}, sum of both "
        f"{start['sum']:.2f}, picture and sentence fused {start['untrained']:.2f}"
    )
    if overfit is not None:
        print(f"  R@1 among {OVERFIT} triplets after training on nothing else: {overfit:.2f}")
    more = {"chance_R1": chance, "start_R1": start, "overfit_R1": overfit}
    write_json(out / "metrics.json", {**evaluation, **more})
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
    picture = itcpr.query["img_paths"][0]
    for command in (
        ["fafa-index", *run_flags, "--images", str(out / "world" / "ITCPR"), "--out", index],
        ["fafa-search", *run_flags, "--index", index, "--image", picture, "--text", "Wearing a red coat."],
    ):
        print(f"  {shlex.join(command)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fafa-toy", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="toy", help="folder for everything that is written")
    add_start(parser)
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the training")
    parser.add_argument(
        "--more",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="flags to append to the training command, as in --more='--loss-fd 0'",
    )
    parser.add_argument("--ids", type=whole_number(3), help="identities of the world instead of the tuned number")
    parser.add_argument("--epochs", type=whole_number(1), help="epochs instead of the tuned number")
    parser.add_argument("--overfit", action="store_true", help=f"first train on {OVERFIT} triplets alone and find them")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    return parser.parse_args(argv)
