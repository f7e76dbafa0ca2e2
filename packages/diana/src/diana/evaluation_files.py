"""Files of an evaluation: metrics.json, one evaluation JSON per result, ranked lists, the curve over the rounds."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diana.evaluation import COLUMNS, KEYS, Row

CMC_RANKS = 50


def write_files(
    out: Path, rows: Sequence[Row], args: argparse.Namespace, metas: dict[str, dict[str, Any]]
) -> list[Path]:
    """Write everything into `out`.

    Args:
        out: folder, made if absent.
        rows: all results.
        args: flags of the evaluation.
        metas: data set -> its configuration with `view`.

    Returns:
        The files.
    """
    from tbps_common.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    written = [out / "metrics.json"]
    write_json(written[0], [row.as_json() for row in rows])
    for number, row in enumerate(rows):
        name = "evaluation.json" if len(rows) == 1 else f"evaluation_{number + 1}_{_turn_name(row)}.json"
        written.append(_write_evaluation(out / name, row, args))
    best = max(rows, key=lambda row: row.best_r1)
    if args.pictures:
        written.append(_draw_ranked_list(out / "ranked_list.png", best, metas[best.dataset]["view"], args.pictures))
        written.append(_draw_cmc(out / "cmc.png", best))
    sweep = [row for row in rows if (row.pretrained, row.dataset) == (best.pretrained, best.dataset)]
    if len(sweep) > 1:
        written += _write_turns(out, sweep, metas[best.dataset]["view"], draw=args.pictures > 0)
    return written


def _turn_name(row: Row) -> str:
    limit = row.evaluation.turn_limit
    return "all_rounds" if limit < 0 else f"round_{limit}"


def _write_evaluation(path: Path, row: Row, args: argparse.Namespace) -> Path:
    from tbps_common.report.evaluation import write_evaluation

    evaluation = row.evaluation
    counts = {"queries": evaluation.num_queries, "gallery": len(evaluation.paths)}
    if evaluation.num_skipped:
        counts["queries_without_positive"] = evaluation.num_skipped
    write_evaluation(
        path,
        package="diana",
        dataset=row.dataset,
        split=row.split,
        metrics={mode: {name: metrics[KEYS[name]] for name in COLUMNS} for mode, metrics in evaluation.metrics.items()},
        counts=counts,
        settings={
            "turn_limit": evaluation.turn_limit,
            "mode": args.mode,
            "max_seq_length": args.max_seq_length,
            "dtype": args.dtype,
            "sim_dtype": args.sim_dtype,
        },
        checkpoint=row.pretrained,
        fingerprint=row.fingerprint,
        cmc={mode: result.cmc.tolist() for mode, result in evaluation.results.items()},
        seconds=row.seconds,
    )
    return path


def _best_mode(row: Row) -> str:
    return max(row.evaluation.metrics, key=lambda mode: row.evaluation.metrics[mode]["r1"])


def _draw_ranked_list(path: Path, row: Row, view: dict[str, list[Any]], count: int) -> Path:
    from tbps_common.report.pictures import Hit, RankedQuery, example_queries, ranked_list

    mode = _best_mode(row)
    result: Any = row.evaluation.results[mode]
    queries = []
    for query in example_queries(result.first_rank.tolist(), count):
        hits = [
            Hit(view["images"][place], score, view["image_ids"][place] == view["caption_ids"][query])
            for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
        ]
        text = dialogue_text(view["chats"][query], row.evaluation.turn_limit)
        queries.append(RankedQuery(text=text, hits=hits))
    rounds = "whole dialogues" if row.evaluation.turn_limit < 0 else f"{row.evaluation.turn_limit} round(s)"
    ranked_list(path, queries, title=f"DiaNA on {row.dataset}, {row.split} split, {rounds}, {mode} similarity")
    return path


def dialogue_text(chat: list[list[dict[str, str]]], turn_limit: int) -> str:
    """The answers of a dialogue, for a picture's margin."""
    rounds = chat[:turn_limit] if turn_limit > 0 else chat
    return " ".join(message["value"] for messages in rounds for message in messages if message["from"] == "user")


def _draw_cmc(path: Path, row: Row) -> Path:
    from tbps_common.report.pictures import cmc_curve

    curves = {mode: result.cmc[:CMC_RANKS].tolist() for mode, result in row.evaluation.results.items()}
    cmc_curve(path, curves, title=f"DiaNA on {row.dataset}, {row.split} split")
    return path


def _write_turns(out: Path, rows: Sequence[Row], view: dict[str, list[Any]], *, draw: bool) -> list[Path]:
    """R@1 over the rounds of the dialogue that are used; -1 stands at the longest dialogue's length."""
    from tbps_common.files import write_json

    longest = max(len(chat) for chat in view["chats"])
    points = sorted(
        ({"rounds": min(limit, longest) if (limit := row.evaluation.turn_limit) > 0 else longest, **row.as_json()}
         for row in rows),
        key=lambda point: (point["rounds"], point["turn_limit"] < 0),
    )  # fmt: skip
    written = [out / "turns.json"]
    write_json(written[0], points)
    if draw:
        curves = {
            mode: [(point["rounds"], point["metrics"][mode]["r1"]) for point in points] for mode in points[0]["metrics"]
        }
        written.append(draw_turns(out / "turns.png", curves))
    return written


def draw_turns(path: Path, curves: dict[str, list[tuple[int, float]]]) -> Path:
    """Draw R@1 over the number of rounds.

    Args:
        path: PNG file to write, whole or not at all.
        curves: mode -> (rounds, R@1 in percent).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from tbps_common.files import atomic_path

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
