"""`compare-toy`: the models of the papers' toys and a plain CLIP on one gallery of people whom none of them has seen.

Every step is an ordinary command, echoed before it runs. A second call continues where the first one was stopped.
"""

import argparse
import csv
import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter
from tbps_world.toys.mra import CHOSEN
from tbps_world.toys.steps import StepFailed, call

DESCRIPTION = """\
Train the models of cmlfa-toy, mra-toy, fafa-toy and diana-toy (or take those that are there), draw another world, index
pictures of its test people with all models, and ask them for these people: in words, with a picture and words, and in
dialogues. Writes a page of tables and the figures as JSON beside it. Needs no download and no GPU. Two
minutes with trained toys, otherwise the time of their trainings.
(The fifth paper, DP, makes training data and searches for nobody.)
"""
MARK = "<!-- Everything below was written by compare-toy. -->"
SEED = "1"  # the toys' own worlds have seed 0
# Of each toy: what it leaves when it has ended, and flags that end it within a minute or two.
TOYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cmlfa": ("metrics.json", ("--preset", "tiny", "--epochs", "2", "--start", "random")),
    "mra": ("metrics.json", ("--preset", "tiny", "--networks", "tiny", "--sda_epochs", "1", "--cuhk_epochs", "2")),
    "fafa": ("metrics.json", ("--ids", "48", "--epochs", "1", "--start", "random")),
    "diana": (
        "evaluation/metrics.json",
        ("--preset", "tiny", "--start", "random", "--pretrain_steps", "2", "--finetune_steps", "2"),
    ),
}
TITLES = {"clip": "CLIP", "cmlfa": "CMLFA", "mra": "MRA", "fafa": "FAFA", "diana": "DiaNA"}
# Task -> its queries, its models (the first one is the one that the others are compared with), and more flags.
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("cmlfa", "clip", "mra"), ("--judge", "10")),
    "composed": (("fafa", "clip", "cmlfa", "mra"), ("--baselines",)),
    "dialogue": (("diana", "clip", "cmlfa", "mra"), ("--join_dialogue", "--by_rounds")),
}
METRICS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP": "mAP", "mINP": "mINP"}


def main(argv: list[str]) -> int:
    """Run the steps; the exit status of a step that fails is passed on."""
    flags = _parse(argv)
    out = Path(flags.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    folders = {paper: Path(getattr(flags, paper) or out / paper).resolve() for paper in TOYS}
    page = Path(flags.page or out / "comparison.md").resolve()
    started = time.perf_counter()
    try:
        for paper, folder in folders.items():
            _train(paper, folder, TOYS[paper][1] if flags.quick else ())
        people = _draw(out, "tiny" if flags.quick else "small")
        models = _models(folders, flags.clip)
        # MRA's checkpoint names its vocabulary relative to the folder of its training.
        with chdir(folders["mra"]):
            _compare(out, people, folders, models)
    except StepFailed as failure:
        return failure.status
    _conclude(out, people, page, models)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def _train(paper: str, folder: Path, more: Sequence[str]) -> None:
    from tbps_world import cli

    if not (folder / TOYS[paper][0]).is_file():
        toy = {
            "cmlfa": cli.cmlfa_toy_main,
            "mra": cli.mra_toy_main,
            "fafa": cli.fafa_toy_main,
            "diana": cli.diana_toy_main,
        }[paper]
        call(f"{paper}-toy", toy, ["--out", str(folder), *more])


def _models(folders: dict[str, Path], clip: str | None) -> dict[str, str]:
    """`KIND:PLACE` of every model."""
    runs = {
        "cmlfa": sorted((folders["cmlfa"] / "logs" / "CUHK-PEDES").glob("*_cmlfa_parts/configs.yaml")),
        "fafa": sorted((folders["fafa"] / "runs").glob("*_toy/flags.json")),
    }
    for paper, found in runs.items():
        if not found:
            raise InputError(
                f"--{paper} {folders[paper]} holds no run of {paper}-toy: name the folder that its --out named"
            )
    from cmlfa.config import load_train_configs

    start = load_train_configs(runs["cmlfa"][-1])["pretrain_choice"]
    return {
        "clip": f"clip:{clip or start}",
        "cmlfa": f"cmlfa:{runs['cmlfa'][-1].parent}",
        "mra": f"mra:{folders['mra'] / CHOSEN}",
        "fafa": f"fafa:{runs['fafa'][-1].parent}",
        "diana": f"diana:{folders['diana'] / 'finetune'}",
    }


def _draw(out: Path, preset: str) -> Path:
    """Draw the world, and write the list of pictures, who they show, and the queries."""
    from tbps_world.cli import synth_main

    world = out / "people"
    arguments = ["--out", str(world / "world"), "--preset", preset, "--seed", SEED]
    call("tbps-synth", synth_main, [*arguments, "--layouts", "cuhk,itcpr,chatpedes"])
    captions = [record for record in _read(world / "world/CUHK-PEDES/reid_raw.json") if record["split"] == "test"]
    shown = [(f"CUHK-PEDES/imgs/{record['file_path']}", record["id"], str(record["id"])) for record in captions]
    for record in _read(world / "world/ITCPR/gallery.json"):
        # Who wears something else is somebody else to look for; the pictures in no query's outfit answer nothing.
        change = "changed" if record["instance_id"] >= 0 else "other"
        shown.append((f"ITCPR/{record['file_path']}", record["person_id"], f"{record['person_id']}-{change}"))
    with open(world / "gallery.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "person", "outfit:string"])
        rows.writerows((world / "world" / path, person, outfit) for path, person, outfit in shown)
    _write(world / "gallery.txt", [str(world / "world" / path) for path, _, _ in shown])
    queries: dict[str, list[dict[str, Any]]] = {
        "text": [
            {"text": caption, "identity": str(record["id"]), "person": str(record["id"])}
            for record in captions
            for caption in record["captions"]
        ],
        "composed": [
            {
                "image": f"world/ITCPR/{record['file_path']}",
                "text": record["caption"],
                "identity": f"{record['person_id']}-changed",
                "person": str(record["person_id"]),
            }
            for record in _read(world / "world/ITCPR/query.json")
        ],
        "dialogue": [
            {"dialogue": dialogue, "identity": str(record["id"]), "person": str(record["id"])}
            for record in _read(world / "world/ChatPedes/test_reid.json")
            for dialogue in ([record["chats"]] if isinstance(record["chats"][0][0], dict) else record["chats"])
        ],
    }
    for task, records in queries.items():
        _write(world / f"{task}.jsonl", [json.dumps(record, ensure_ascii=False) for record in records])
    return world


def _compare(out: Path, people: Path, folders: dict[str, Path], models: dict[str, str]) -> None:
    """Index the people with every model, and ask what has not been asked yet."""
    from tbps_common.cli import compare_main, index_main

    gallery = str(people / "people.lance")
    for model in models.values():
        arguments = ["--model", model, "--images", str(people / "gallery.txt"), "--out", gallery]
        call("tbps-index", index_main, [*arguments, "--metadata", str(people / "gallery.csv")])
    for task, (papers, more) in TASKS.items():
        arguments = ["--gallery", gallery, "--queries", str(people / f"{task}.jsonl")]
        arguments += [word for paper in papers for word in ("--model", models[paper])]
        arguments += ["--identity", "outfit", *more, "--out", str(out / f"comparison_{task}")]
        toys = [folders[paper] / TOYS[paper][0] for paper in papers if paper in TOYS]
        if not _is_done(out / f"comparison_{task}" / "comparison.json", toys, models["clip"]):
            call("tbps-compare", compare_main, arguments)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, lines: Sequence[str]) -> None:
    from tbps_common.files import write_text

    write_text(file, "".join(f"{line}\n" for line in lines))


def _is_done(file: Path, toys: Sequence[Path], clip: str) -> bool:
    """Whether a comparison with this CLIP is there, and younger than the toys' models."""
    return (
        file.is_file()
        and any(clip == entry["name"].partition(", ")[0] for entry in _entries(_read(file)))
        and all(toy.stat().st_mtime < file.stat().st_mtime for toy in toys)
    )


def _entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for summary in document["tasks"].values() for entry in summary["models"]]


# The page.


def _conclude(out: Path, people: Path, page: Path, models: dict[str, str]) -> None:
    from tbps_common.files import write_json, write_text

    titles = {model: TITLES[kind] for kind, model in models.items()}
    with open(people / "gallery.csv", encoding="utf-8", newline="") as file:
        outfits = Counter(row["outfit:string"] for row in csv.DictReader(file))
    figures: dict[str, Any] = {}
    parts = [MARK, f"{outfits.total()} pictures; in brackets 95 % intervals over persons."]
    for task in TASKS:
        document = _read(out / f"comparison_{task}" / "comparison.json")
        queries = [json.loads(line) for line in (people / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        chance = 100 * sum(outfits[query["identity"]] for query in queries) / len(queries) / outfits.total()
        for entry in _entries(document):
            name, comma, way = entry["name"].partition(", ")
            entry["name"] = titles[name] + comma + way
        figures[task] = {**document, "chance_R1": chance}
        parts.append(_rounds(document["tasks"], chance) if task == "dialogue" else _table(document["tasks"], chance))
    earlier = page.read_text(encoding="utf-8") if page.is_file() else "# The five papers on one gallery\n\n"
    write_text(page, earlier.partition(MARK)[0] + "\n\n".join(parts) + "\n")
    write_json(page.with_suffix(".json"), figures, indent=1)
    print(f"\nwrote {page} and {page.with_suffix('.json')}")


def _table(tasks: dict[str, Any], chance: float) -> str:
    ((task, summary),) = tasks.items()
    first = summary["models"][0]["name"]
    rows = [f"| model | {' | '.join(METRICS.values())} | R@1 minus {first} | encoding, ms | search, ms |"]
    rows.append("| --- |" + " --- |" * (len(METRICS) + 3))
    for entry in summary["models"]:
        cells = [_interval(entry["metrics"][name]) for name in METRICS]
        cells.append(_interval(entry["difference"]["R1"], "+") if entry["difference"] else "")
        cells += [f"{entry['encode_ms']:.1f}", f"{entry['search_ms']:.1f}"]
        rows.append(f"| {entry['name']} | {' | '.join(cells)} |")
    rows.append(f"| chance | {chance:.2f} |" + " |" * (len(METRICS) + 2))
    return "\n".join([f"## {task}: {summary['queries']} queries, {summary['persons']} persons", "", *rows])


def _rounds(tasks: dict[str, Any], chance: float) -> str:
    """R@1 and mAP of each model by rounds."""
    summaries = list(tasks.values())
    heads = [task.partition(", ")[2] for task in tasks]
    parts = [f"## dialogue: {summaries[0]['queries']} queries, {summaries[0]['persons']} persons (chance {chance:.2f})"]
    for metric in ("R1", "mAP"):
        rows = [f"| {METRICS[metric]} after | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for place, entry in enumerate(summaries[0]["models"]):
            cells = [_interval(summary["models"][place]["metrics"][metric]) for summary in summaries]
            rows.append(f"| {entry['name']} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    first, last = summaries[0]["models"][0]["name"], summaries[-1]["models"]
    minus = [f"{entry['name']} {_interval(entry['difference']['R1'], '+')}" for entry in last[1:]]
    parts.append(f"R@1 after {heads[-1]}, minus that of {first}, dialogue by dialogue: {'; '.join(minus)}.")
    return "\n\n".join(parts)


def _interval(metric: dict[str, float], sign: str = "") -> str:
    return f"{metric['value']:{sign}.1f} [{metric['low']:{sign}.1f}, {metric['high']:{sign}.1f}]"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare-toy", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="toy", metavar="DIR", help="folder for everything that is written")
    for paper in TOYS:
        add(
            f"--{paper}",
            metavar="DIR",
            help=f"folder of a {paper}-toy (default: OUT/{paper}, trained if it is not there)",
        )
    add(
        "--clip",
        metavar="PLACE",
        help="of clip:PLACE, such as ViT-B-16/openai (default: the weights that CMLFA starts from)",
    )
    add("--page", metavar="FILE", help="page to write, or whose tables to replace (default: OUT/comparison.md)")
    add("--quick", action="store_true", help="models and world of the smallest size, which learn nothing")
    return parser.parse_args(argv)
