"""`fafa-syncpr-toy`: every stage by its ordinary command, on this machine, from nothing to a trained FAFA.

Each command is echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tbps_common.files import write_json
from tbps_common.pipeline.stages import manifest_path
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_world.toys.fafa import COLUMNS, LEARNING_FLAGS, MODEL_NAME, RANDOM_FLAGS, README_FLAGS, START_FLAGS
from tbps_world.toys.steps import StepFailed, add_start, start_weights

DESCRIPTION = """\
From scratch to a trained FAFA with tiny models, on the CPU:

  synthetic pedestrians -> a tiny Stable Diffusion and CLIP that learn from them (the former from two different persons
  side by side) -> a LoRA from pairs of one person -> quadruples of a practice chat server on this machine ->
  pictures -> filter -> SynCPR.json -> fafa-train -> fafa-infer on synthetic ITCPR

FAFA begins with start weights of tbps-train-tiny (--start random: with random ones); what they find by themselves is printed
beside what they find after the training.

The pictures are of 64 x 64 pixels, by a model that was trained for minutes, and more blob than person: what the toy shows is
that every command works and that the files fit together. Results in OUT: metrics.json, stages.json (throughput and drops),
syncpr/preview.png.
"""

SIDE = 64
TEMPLATE = "Left: {caption_1} Right: {caption_2}"
_COLOURS = ("black", "white", "red", "blue", "green", "yellow", "pink", "orange", "purple")
_UPPER = ("t-shirt", "jacket", "coat", "hoodie")
_LOWER = ("trousers", "jeans", "shorts")
_LOWER_COLOURS = ("black", "white", "blue", "brown", "green", "red")


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of one that fails is passed on."""
    parser = argparse.ArgumentParser(
        prog="fafa-syncpr-toy", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="folder for everything that is written")
    parser.add_argument("--ids", type=whole_number(3), default=400, help="identities of the synthetic world")
    parser.add_argument("--updates", type=whole_number(1), default=800, help="updates of the tiny Stable Diffusion")
    parser.add_argument("--lora-steps", type=whole_number(1), default=150, help="steps of the LoRA")
    parser.add_argument("--count", type=whole_number(1), default=200, help="quadruples")
    parser.add_argument("--variants", type=whole_number(1), default=2, help="pictures per quadruple")
    parser.add_argument("--steps", type=whole_number(1), default=20, help="steps of the sampler")
    parser.add_argument(
        "--min-image-text",
        type=number(-1),
        default=-0.5,
        help="threshold of the filter; the tiny CLIP has its own scale",
    )
    parser.add_argument(
        "--min-identity", type=number(-1), default=0.2, help="threshold of the filter; the tiny CLIP has its own scale"
    )
    parser.add_argument("--max-pair-similarity", type=number(-1), default=0.995, help="threshold of the filter")
    parser.add_argument("--epochs", type=whole_number(1), default=10, help="epochs of FAFA's training")
    add_start(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    flags = parser.parse_args(argv)
    from tbps_common.pipeline.models import require_libraries

    require_libraries(
        "fafa-syncpr-toy", "packages/fafa[syncpr]", "diffusers", "transformers", "peft", "openai", "tokenizers"
    )
    out = Path(flags.out)
    started = time.perf_counter()
    try:
        trained = start_weights("blip2", flags.start)
    except StepFailed as failure:
        return failure.status
    flags.backbone = (trained or out / "fafa") / "tiny.yaml"
    for step in (_world, _models, _lora, _quadruples, _pictures, _fafa):
        status = step(out, flags)
        if status:
            return status
    _conclude(out, time.perf_counter() - started)
    return 0


def toy_attributes() -> dict[str, Any]:
    """Seed lists in the words of the synthetic pedestrians, which is all that the tiny models know."""
    hair = [
        f"{length} {colour} hair" for length in ("short", "long") for colour in ("black", "brown", "blonde", "grey")
    ]
    bags = [f"a {colour} {bag}" for colour in ("black", "red", "blue") for bag in ("backpack", "handbag")]
    return {
        "person": {
            "gender": [f"{age} {who}" for age in ("young", "middle-aged", "elderly") for who in ("man", "woman")],
            "hair": hair,
        },
        "picture": {
            "upper": [
                f"a{'n' if colour == 'orange' else ''} {colour} {kind}" for colour in _COLOURS for kind in _UPPER
            ],
            "lower": [f"{colour} {kind}" for colour in _LOWER_COLOURS for kind in _LOWER],
            "shoes": [f"{colour} {kind}" for colour in ("black", "white", "brown") for kind in ("sneakers", "boots")],
            "belongings": ["nothing in the hands", *bags],
        },
        "changes": ["upper", "lower", "belongings"],
    }


def _world(out: Path, flags: argparse.Namespace) -> int:
    from tbps_world.cli import synth_main

    if (out / "world" / "manifest.json").is_file():
        return 0
    size = ["--preset", "small", "--ids", str(flags.ids), "--height", "384", "--format", "jpg"]
    return _do("tbps-synth", synth_main, ["--out", str(out / "world"), *size, "--layouts", "syncpr,itcpr"])


def _models(out: Path, flags: argparse.Namespace) -> int:
    from tbps_world.cli import fafa_tiny_main, syncpr_tiny_main

    if not flags.backbone.is_file():
        status = _do("fafa-make-tiny", fafa_tiny_main, [str(out / "fafa"), "--for", "pedestrians"])
        if status:
            return status
    if (out / "models" / "sd" / "model_index.json").is_file():
        return 0
    teach = ["--learn", str(out / "world" / "SynCPR"), "--updates", str(flags.updates)]
    return _do("fafa-syncpr-make-tiny", syncpr_tiny_main, ["--out", str(out / "models"), *teach])


def _lora(out: Path, flags: argparse.Namespace) -> int:
    size = ["--height", str(SIDE), "--width", str(SIDE)]
    if not (out / "pairs" / "captions.jsonl").is_file():
        places = ["--out", str(out / "pairs"), "--syncpr", str(out / "world" / "SynCPR")]
        status = _syncpr("pairs", *places, *size, "--prompt-template", TEMPLATE)
        if status:
            return status
    places = ["--out", str(out / "lora"), "--data", str(out / "pairs"), "--model", str(out / "models" / "sd")]
    pace = ["--steps", str(flags.lora_steps), "--batch-size", "8", "--rank", "8", "--learning-rate", "1e-3"]
    pace += ["--warmup", "10", "--save-every", "50", "--num-workers", "0"]
    return _syncpr("lora", *places, *size, *pace, "--device", flags.device)


def _quadruples(out: Path, flags: argparse.Namespace) -> int:
    lists = out / "attributes.json"
    if not lists.is_file():
        write_json(lists, toy_attributes())
    with _practice_server():
        places = ["--out", str(out / "syncpr"), "--attributes", str(lists)]
        return _syncpr("quadruples", *places, "--count", str(flags.count), "--model", "practice")


def _pictures(out: Path, flags: argparse.Namespace) -> int:
    data = ["--out", str(out / "syncpr")]
    size = ["--height", str(SIDE), "--width", str(SIDE), "--prompt-template", TEMPLATE]
    pace = ["--variants", str(flags.variants), "--steps", str(flags.steps), "--batch-size", "8", "--guidance", "3"]
    model = ["--model", str(out / "models" / "sd"), "--lora", str(out / "lora" / "pytorch_lora_weights.safetensors")]
    status = _syncpr("images", *data, *model, *size, *pace, "--device", flags.device)
    if status:
        return status
    thresholds = ["--min-image-text", str(flags.min_image_text), "--min-identity", str(flags.min_identity)]
    thresholds += ["--max-pair-similarity", str(flags.max_pair_similarity)]
    judges = ["--clip", str(out / "models" / "clip"), "--vlm-model", "practice"]
    with _practice_server():
        status = _syncpr("filter", *data, *judges, *thresholds, "--device", flags.device)
    return status or _syncpr("pack", *data, "--both-directions", "--preview", "8")


def train_arguments(out: Path, backbone: Path, epochs: int, device: str) -> list[str]:
    """The paper's training command on the packed file, with flags for the toy's size appended."""
    return [
        *("--dataset", "cpr", "--syncpr-data-path", str(out / "syncpr"), "--itcpr-root", str(out / "world" / "ITCPR")),
        *README_FLAGS,
        *("--backbone", str(backbone), "--exp-name", "syncpr", "--output-dir", str(out / "runs")),
        *("--num-epochs", str(epochs)),
        *LEARNING_FLAGS,
        *(RANDOM_FLAGS if backbone.is_relative_to(out) else START_FLAGS),
        *("--seed", "0"),
        *("--device", device),
    ]


def _fafa(out: Path, flags: argparse.Namespace) -> int:
    from fafa.cli import infer_main, train_main
    from fafa.run_directory import has_state

    def newest() -> Path | None:
        return max((path for path in (out / "runs").glob("*_syncpr") if has_state(path)), default=None)

    arguments = train_arguments(out, flags.backbone, flags.epochs, flags.device)
    if newest() is not None:
        arguments += ["--resume", "auto"]
    status = _do("fafa-train", train_main, arguments)
    directory = newest()
    if status or directory is None:
        return status or 1
    where = ["--exp-dir", str(directory), "--model-name", MODEL_NAME, "--itcpr-root", str(out / "world" / "ITCPR")]
    pace = ["--batch-size", "256", "--num-workers", "1", "--device", flags.device]
    status = _do("fafa-infer", infer_main, [*where, *pace])
    if not status:
        _note_metrics(out, directory, flags.backbone)
    return status


def _note_metrics(out: Path, directory: Path, backbone: Path) -> None:
    from tbps_common.datasets import ITCPR
    from tbps_common.report.evaluation import read_evaluation
    from tbps_world.toys.fafa import baselines, chance_of_first

    itcpr = ITCPR(out / "world" / "ITCPR", verbose=False)
    more = {"chance_R1": chance_of_first(itcpr), "start_R1": baselines(backbone, itcpr)}
    write_json(out / "metrics.json", {**read_evaluation(directory / "evaluation.json"), **more})


def _conclude(out: Path, seconds: float) -> None:
    stages = {
        name: stage_numbers(manifest_path(out / file))
        for name, file in (
            ("lora (steps)", "lora/pytorch_lora_weights.safetensors"),
            ("quadruples", "syncpr/quadruples.jsonl"),
            ("pictures", "syncpr/images.jsonl"),
            ("scored pairs", "syncpr/scores.jsonl"),
            ("asked pairs", "syncpr/vlm.jsonl"),
            ("kept pairs", "syncpr/kept.jsonl"),
        )
    }
    write_json(out / "stages.json", stages)
    print(f"\n{'stage':14}{'done':>8}{'dropped':>9}{'per second':>12}")
    for name, numbers in stages.items():
        rate = f"{numbers['per_second']:.2f}" if numbers["per_second"] else "-"
        print(f"{name:14}{numbers['kept']:>8}{sum(numbers['dropped'].values()):>9}{rate:>12}")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    found = metrics["metrics"]["com"]
    print("\nFAFA trained on the result: " + "  ".join(f"{name} {found[name]:.2f}" for name in COLUMNS))
    start = metrics["start_R1"]
    print(
        f"R@1 before: {start['untrained']:.2f} (picture alone {start['picture']:.2f}, sentence alone {start['sentence']:.2f}, "
        f"sum of both {start['sum']:.2f}); by chance: {metrics['chance_R1']:.2f}"
    )
    print(
        f"\n{seconds / 60:.1f} minutes. See {out / 'syncpr' / 'preview.png'} and at the pictures in {out / 'syncpr'}."
    )


def stage_numbers(path: Path) -> dict[str, Any]:
    """Counts and throughput out of a manifest."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    dropped = manifest.get("dropped", {})
    seconds = manifest.get("seconds", 0.0)
    done = manifest["kept"] + sum(dropped.values())
    return {
        "kept": manifest["kept"],
        "dropped": dropped,
        "seconds": seconds,
        "per_second": round(done / seconds, 3) if seconds else None,
    }


def _syncpr(*words: str) -> int:
    from fafa.cli import syncpr_main

    return _do("fafa-syncpr", syncpr_main, list(words))


def _do(name: str, command: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    print(f"\n$ {name} {shlex.join(arguments)}\n", flush=True)
    return command(arguments) or 0


@contextmanager
def _practice_server() -> Iterator[None]:
    """A chat server on this machine, named by the environment for as long as the context lasts."""
    from tbps_world.practice.server import PracticeServer
    from tbps_world.practice.syncpr import answer

    names = ("OPENAI_BASE_URL", "OPENAI_API_KEY")
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in names}
    with PracticeServer(answer) as server:
        os.environ.update(dict(zip(names, (server.url, "none-needed"))))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
