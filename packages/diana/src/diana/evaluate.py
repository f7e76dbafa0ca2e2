"""The evaluation command: tables as released, and files that last (JSON, ranked pictures, the curve over the rounds)."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from prettytable import PrettyTable

from diana.data.annotations import image_folder, load_annotations, load_dataset_config
from diana.metrics import NAMES
from diana.model.config import DiaNAConfig
from diana.model.diana import DTYPES, load_diana
from diana.model.folders import resolve_folder
from diana.options import EvalOptions
from diana.published import PUBLISHED
from diana.retrieval.evaluation import Evaluation, evaluate
from tbps_common.errors import InputError
from tbps_common.files import atomic_path, write_json
from tbps_common.images import check_images_exist
from tbps_common.report.evaluation import write_evaluation
from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, example_queries, ranked_list
from tbps_common.report.published import compare_with_published, published_report
from tbps_common.run.checkpoint import fingerprint
from tbps_common.run.device import allow_tf32, choose_device

CMC_RANKS = 50
_STEPS = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class EvaluationSet:
    """One data set: its entry of the YAML file, and its annotations as `load_annotations` gives them."""

    name: str
    meta: dict[str, Any]
    view: dict[str, list[Any]]


@dataclass(frozen=True)
class Row:
    """One checkpoint evaluated on one data set at one turn limit."""

    pretrained: str
    dataset: EvaluationSet
    evaluation: Evaluation
    fingerprint: str
    seconds: float

    @property
    def steps(self) -> int | None:
        return steps_of(self.pretrained)

    @property
    def best_mode(self) -> str:
        metrics = self.evaluation.metrics
        return max(metrics, key=lambda mode: metrics[mode]["r1"])

    @property
    def best_r1(self) -> float:
        return self.evaluation.metrics[self.best_mode]["r1"]


def evaluate_checkpoints(options: EvalOptions) -> int:
    """Check data and checkpoints, evaluate every checkpoint on every data set, print the tables, write the files.

    Returns:
        Exit status: 1 if the best result is not what `--require_published` asks for.

    Raises:
        InputError: a file, an image or a checkpoint cannot be used, or a checkpoint has no refiner and one is needed.
    """
    output_dir = Path(options.output_dir) if options.output_dir else None
    if output_dir is not None and output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: give a folder")
    datasets = [_read_dataset(name, options) for name in options.dataset]
    for pretrained in options.pretrained:
        config = DiaNAConfig.from_file(resolve_folder(pretrained) / "config.json")
        if options.mode != "global" and not config.enable_refiner:
            raise InputError(
                f"--mode {options.mode} needs the attribute refiner, which {pretrained} does not have: use --mode global"
            )
    device = choose_device(options.device)
    allow_tf32(options.tf32)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    checkpoints = sorted_checkpoints(options.pretrained)
    for number, pretrained in enumerate(checkpoints, start=1):
        print(f"Evaluate the {number}/{len(checkpoints)}-th model.", flush=True)
        for dataset in datasets:
            rows += _evaluate(options, pretrained, dataset, device)
    print("Best metrics:")
    best = max(rows, key=lambda row: row.best_r1)  # the first of equals
    print(table(best))
    published = compare_with_published(PUBLISHED, **_measured(best, options))
    text, status = published_report(published, options.require_published)
    if text:
        print(text)
    if output_dir is not None:
        for path in write_files(output_dir, rows, options):
            print(f"wrote {path}")
    return status


def _read_dataset(name: str, options: EvalOptions) -> EvaluationSet:
    meta = load_dataset_config(options.dataset_config_path, name)
    view = load_annotations(meta, options.split)
    check_images_exist(view["images"], image_folder(meta), flag="DIANA_DATA_ROOT")
    return EvaluationSet(name, meta, view)


def sorted_checkpoints(folders: Sequence[str]) -> list[str]:
    """In the order given or, if the first is called `checkpoint-N`, by N."""
    if not _STEPS.search(folders[0]):
        return list(folders)
    return sorted(folders, key=lambda folder: steps_of(folder) or 0)


def steps_of(folder: str) -> int | None:
    """N of `checkpoint-N` in a path."""
    match = _STEPS.search(folder)
    return int(match[1]) if match else None


def _evaluate(options: EvalOptions, pretrained: str, dataset: EvaluationSet, device: torch.device) -> list[Row]:
    model, tokenizer = load_diana(pretrained, device=device, dtype=DTYPES[options.dtype])
    _announce(options.turn_limit[0], pretrained, dataset)
    started = time.perf_counter()
    evaluations = evaluate(
        model,
        tokenizer,
        dataset.meta,
        view=dataset.view,
        split=options.split,
        turn_limits=options.turn_limit,
        mode=options.mode,
        batch_size=options.batch_size,
        text_batch_size=options.text_batch_size,
        max_seq_length=options.max_seq_length,
        num_workers=options.num_workers,
        sim_dtype=options.sim_dtype,
        progress=True,
    )
    seconds = (time.perf_counter() - started) / len(evaluations)
    mark = fingerprint(model.state_dict(), model.config.to_dict())
    rows = []
    for number, evaluation in enumerate(evaluations):
        if number:
            _announce(evaluation.turn_limit, pretrained, dataset)
        rows.append(Row(pretrained, dataset, evaluation, mark, seconds))
        print(table(rows[-1]))
        print(flush=True)
    return rows


def _announce(turn_limit: int, pretrained: str, dataset: EvaluationSet) -> None:
    print(f"Running evaluation under 'round={turn_limit}' with model '{pretrained}'.")
    print(f"There are {len(set(dataset.view['images']))} images.")
    print(f"There are {len(set(dataset.view['image_ids']))} ids.")
    print(f"There are {len(dataset.view['chats'])} captions.", flush=True)


def table(row: Row) -> PrettyTable:
    """The released table: one line per mode."""
    result = PrettyTable(["Steps", "Mode", *NAMES.values(), "Time"])
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    for mode, metrics in row.evaluation.metrics.items():
        values = (f"{metrics[name]:.2f}" for name in NAMES)
        result.add_row(["-" if row.steps is None else row.steps, mode, *values, now])
    return result


def write_files(out: Path, rows: Sequence[Row], options: EvalOptions) -> list[Path]:
    """Write metrics.json, one evaluation JSON per row, and the pictures and the curve of the best row's checkpoint.

    Args:
        out: folder, created if absent.
        rows: all results.
        options: flags of the evaluation.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "metrics.json"]
    write_json(written[0], [_metrics_entry(row, options) for row in rows])
    for number, row in enumerate(rows, start=1):
        limit = row.evaluation.turn_limit
        turns = "all_rounds" if limit < 0 else f"round_{limit}"
        name = "evaluation.json" if len(rows) == 1 else f"evaluation_{number}_{turns}.json"
        written.append(_write_evaluation(out / name, row, options))
    best = max(rows, key=lambda row: row.best_r1)
    title = f"DiaNA on {best.dataset.name}, {options.split} split"
    if options.pictures:
        written.append(_draw_ranked_list(out / "ranked_list.png", best, options.pictures, title))
        curves = {mode: result.cmc[:CMC_RANKS].tolist() for mode, result in best.evaluation.results.items()}
        written.append(cmc_curve(out / "cmc.png", curves, title=title))
    sweep = [row for row in rows if row.pretrained == best.pretrained and row.dataset is best.dataset]
    if len(sweep) > 1:
        written += _write_turns(out, sweep, options)
    return written


def _metrics_entry(row: Row, options: EvalOptions) -> dict[str, Any]:
    """One entry of metrics.json."""
    return {
        "pretrained": row.pretrained,
        "steps": row.steps,
        "dataset": row.dataset.name,
        "split": options.split,
        "turn_limit": row.evaluation.turn_limit,
        "num_images": row.evaluation.num_images,
        "num_queries": row.evaluation.num_queries,
        "num_skipped": row.evaluation.num_skipped,
        "metrics": row.evaluation.metrics,
    }


def _measured(row: Row, options: EvalOptions) -> dict[str, Any]:
    """What was measured on what, under the names of the evaluation file."""
    evaluation = row.evaluation
    counts = {"queries": evaluation.num_queries, "gallery": len(evaluation.paths)}
    if evaluation.num_skipped:
        counts["queries_without_positive"] = evaluation.num_skipped
    return {
        "dataset": row.dataset.name,
        "split": options.split,
        "metrics": {
            mode: {column: metrics[name] for name, column in NAMES.items()}
            for mode, metrics in evaluation.metrics.items()
        },
        "counts": counts,
    }


def _write_evaluation(path: Path, row: Row, options: EvalOptions) -> Path:
    evaluation = row.evaluation
    write_evaluation(
        path,
        package="diana",
        **_measured(row, options),
        published=PUBLISHED,
        settings={
            "turn_limit": evaluation.turn_limit,
            "mode": options.mode,
            "max_seq_length": options.max_seq_length,
            "dtype": options.dtype,
            "sim_dtype": options.sim_dtype,
        },
        checkpoint=row.pretrained,
        fingerprint=row.fingerprint,
        cmc={mode: result.cmc.tolist() for mode, result in evaluation.results.items()},
        seconds=row.seconds,
    )
    return path


def _draw_ranked_list(path: Path, row: Row, count: int, title: str) -> Path:
    evaluation, view, mode = row.evaluation, row.dataset.view, row.best_mode
    result: Any = evaluation.results[mode]
    queries = []
    for query in example_queries(result.first_rank.tolist(), count):
        hits = [
            Hit(view["images"][place], score, view["image_ids"][place] == view["caption_ids"][query])
            for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
        ]
        queries.append(RankedQuery(text=_answers(view["chats"][query], evaluation.turn_limit), hits=hits))
    rounds = "whole dialogues" if evaluation.turn_limit < 0 else f"{evaluation.turn_limit} round(s)"
    ranked_list(path, queries, title=f"{title}, {rounds}, {mode} similarity")
    return path


def _answers(chat: list[list[dict[str, str]]], turn_limit: int) -> str:
    """What the witness said, for a picture's margin."""
    rounds = chat[:turn_limit] if turn_limit > 0 else chat
    return " ".join(message["value"] for messages in rounds for message in messages if message["from"] == "user")


def _write_turns(out: Path, rows: Sequence[Row], options: EvalOptions) -> list[Path]:
    """R@1 over the rounds of the dialogue that are used; -1 stands at the longest dialogue's length."""
    longest = max(len(chat) for chat in rows[0].dataset.view["chats"])
    points = []
    for row in rows:
        limit = row.evaluation.turn_limit
        points.append({"rounds": min(limit, longest) if limit > 0 else longest, **_metrics_entry(row, options)})
    points.sort(key=lambda point: (point["rounds"], point["turn_limit"] < 0))
    written = [out / "turns.json"]
    write_json(written[0], points)
    if options.pictures:
        modes = points[0]["metrics"]
        curves = {mode: [(point["rounds"], point["metrics"][mode]["r1"]) for point in points] for mode in modes}
        written.append(draw_turns(out / "turns.png", curves))
    return written


def draw_turns(path: Path, curves: dict[str, list[tuple[int, float]]]) -> Path:
    """Draw R@1 over the number of rounds.

    Args:
        path: PNG file to write, whole or not at all.
        curves: mode -> (rounds, R@1 in percent).
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mode, points in curves.items():
        axes.plot(*zip(*points), marker="o", markersize=5, linewidth=2, label=mode)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("rounds of the dialogue")
    axes.set_ylabel("R@1 (%)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("What each answer adds", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
