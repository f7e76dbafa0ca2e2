"""The result of an evaluation, and the files made of it: JSON, CMC curves and pictures of ranked lists."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra.published import PUBLISHED
from tbps_common.ranking import RetrievalResult
from tbps_common.report.evaluation import evaluation_from_result
from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, example_queries, ranked_list

_PICTURED_QUERIES = 6


@dataclass(frozen=True)
class SplitEvaluation:
    """What an evaluation found.

    Attributes:
        itc: ranking by the similarities alone.
        itm: ranking after the matching stage: the paper's numbers.
        queries: number of captions.
        gallery: number of images.
        seconds: wall time.
        settings: what of the configuration decides the numbers.
    """

    itc: RetrievalResult
    itm: RetrievalResult
    queries: int
    gallery: int
    seconds: float
    settings: dict[str, Any]


def write_reports(
    folder: str | os.PathLike[str],
    evaluation: SplitEvaluation,
    dataset: Any,
    *,
    name: str,
    split: str,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write `evaluation_<split>.json`, `cmc_<split>.png` and `ranked_list_<split>.png`; the main process calls it.

    Args:
        folder: where to write; must exist.
        evaluation: of `evaluate_split`.
        dataset: the split (`text`, `image_paths`, `g_pids`, `q_pids`).
        name: of the data set.
        split: `val` or `test`.
        checkpoint: the evaluated file.

    Returns:
        The files written.
    """
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
        published=PUBLISHED,
        seconds=evaluation.seconds,
    )
    title = f"MRA on {name}, {split} split"
    curves = {"re-ranked": evaluation.itm.cmc.tolist(), "similarity only": evaluation.itc.cmc.tolist()}
    cmc_curve(files[1], curves, title=title)
    ranked_list(files[2], _pictured_queries(evaluation.itm, dataset), title=title)
    return files


def _pictured_queries(result: RetrievalResult, dataset: Any) -> list[RankedQuery]:
    """Rows of the ranked-list picture: captions spread over the split, some found at rank 1 and some not."""
    assert result.indices is not None and result.scores is not None
    return [
        RankedQuery(
            text=dataset.text[query],
            hits=[
                Hit(dataset.image_paths[place], score, dataset.g_pids[place] == dataset.q_pids[query])
                for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
            ],
        )
        for query in example_queries(result.first_rank.tolist(), _PICTURED_QUERIES)
    ]
