"""What an evaluation leaves behind besides the printed table: a JSON file, ranked-list pictures and CMC curves."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra.retrieval.evaluation import SplitEvaluation
    from tbps_common.report.pictures import RankedQuery

PICTURED_QUERIES = 6


def write_reports(
    folder: str | os.PathLike[str],
    evaluation: "SplitEvaluation",
    dataset: Any,
    *,
    name: str,
    split: str,
    checkpoint: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
) -> list[Path]:
    """Write `evaluation_<split>.json`, `cmc_<split>.png` and `ranked_list_<split>.png`; the main process calls it.

    Args:
        folder: where to write; must exist.
        evaluation: of `evaluate_split`.
        dataset: the split (`text`, `image_paths`, `g_pids`, `q_pids`).
        name: of the data set.
        split: `val` or `test`.
        checkpoint: the evaluated file.
        fingerprint: of the weights (`tbps_common.run.checkpoint.fingerprint`).

    Returns:
        The files written.
    """
    from tbps_common.report.evaluation import evaluation_from_result
    from tbps_common.report.pictures import cmc_curve, ranked_list

    root = Path(folder)
    files = [root / f"evaluation_{split}.json", root / f"cmc_{split}.png", root / f"ranked_list_{split}.png"]
    evaluation_from_result(
        files[0],
        {"t2i": evaluation.itm, "t2i_similarity_only": evaluation.itc},
        gallery=evaluation.gallery,
        package="mra",
        dataset=name,
        split=split,
        settings=evaluation.settings,
        checkpoint=checkpoint,
        fingerprint=fingerprint,
        seconds=evaluation.seconds,
    )
    title = f"MRA on {name}, {split} split"
    curves = {"re-ranked": evaluation.itm.cmc.tolist(), "similarity only": evaluation.itc.cmc.tolist()}
    cmc_curve(files[1], curves, title=title)
    ranked_list(files[2], pictured_queries(evaluation, dataset), title=title)
    return files


def pictured_queries(evaluation: "SplitEvaluation", dataset: Any, count: int = PICTURED_QUERIES) -> "list[RankedQuery]":
    """Rows of the ranked-list picture: captions spread over the split, some found at rank 1 and some not."""
    from tbps_common.report.pictures import Hit, RankedQuery, example_queries

    result = evaluation.itm
    assert result.indices is not None and result.scores is not None
    return [
        RankedQuery(
            text=dataset.text[query],
            hits=[
                Hit(dataset.image_paths[place], score, dataset.g_pids[place] == dataset.q_pids[query])
                for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
            ],
        )
        for query in example_queries(result.first_rank.tolist(), count)
    ]
