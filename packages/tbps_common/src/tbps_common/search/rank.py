"""The best rows of a gallery for queries: exactly, streamed from the disk, or among candidates of the database's index."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tbps_common.errors import GalleryError
from tbps_common.ranking import best_of_rows, score_rows
from tbps_common.search.gallery import Gallery, check_filter, explained, feature_blocks, read_rows
from tbps_common.search.retriever import Feature, Features


def rank(
    gallery: Gallery,
    queries: Features,
    topk: int,
    *,
    where: str | None = None,
    ann: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best rows for each query, exactly, streamed from the disk in bounded memory.

    Args:
        gallery: what is searched.
        queries: `[Q, ...]` features.
        topk: rows wanted.
        where: SQL condition on the columns.
        ann: how many candidates per query the database's index proposes; 0 scores every row.
        device: where to score; by default where the queries are.

    Returns:
        Scores and row numbers (int64) `[Q, min(topk, N)]`, best first, among equal scores the row that was written
        first; and each query's lowest score `[Q]`. All on the CPU.

    Raises:
        GalleryError: `where` is no condition on these columns; with `ann`, there is no index.
        ValueError: the queries do not fit the features, or hold NaN or infinity.
    """
    condition = check_filter(gallery, where)
    count = len(next(iter(queries.values())))
    if ann:
        parts = [
            _ranked(
                gallery,
                {name: part[one : one + 1] for name, part in queries.items()},
                _rows(gallery, _candidates(gallery, queries, one, max(ann, topk), condition)),
                topk,
                device,
            )
            for one in range(count)
        ]
        width = max(scores.shape[1] for scores, _, _ in parts)
        padded = [
            (
                torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=float("-inf")),
                torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1),
                lowest,
            )
            for scores, rows, lowest in parts
        ]
        joined = tuple(torch.cat(column) for column in zip(*padded))
        return joined[0], joined[1], joined[2]
    return _ranked(gallery, queries, feature_blocks(gallery, condition), topk, device)


def _ranked(
    gallery: Gallery,
    queries: Features,
    blocks: Iterator[tuple[Tensor, Features]],
    topk: int,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(next(iter(queries.values())))
    best = torch.empty(count, 0)
    best_rows = torch.empty(count, 0, dtype=torch.int64)
    lowest = torch.full((count,), float("inf"))
    for rows, block in blocks:
        scores = scores_of(gallery.features, queries, block, device)
        lowest = torch.minimum(lowest, scores.amin(dim=1).cpu())
        values, columns = (part.cpu() for part in best_of_rows(scores, topk))
        # Equal scores keep the order of the rows: those met before come first, and the sort is stable.
        best, order = torch.sort(torch.cat([best, values], dim=1), dim=1, descending=True, stable=True)
        best_rows = torch.cat([best_rows, rows[columns]], dim=1).gather(1, order)[:, :topk]
        best = best[:, :topk]
    return best, best_rows, lowest


def scores_of(
    features: Sequence[Feature], queries: Features, pictures: Features, device: torch.device | str | None = None
) -> Tensor:
    """Scores `[Q, N]`: the sum over all features."""
    scores = None
    for one in features:
        rows = score_rows(
            queries[one.name],
            pictures[one.name],
            reduce=one.reduce,
            k=one.k,
            device=queries[one.name].device if device is None else device,
        )
        part = rows(0, rows.num_queries)
        scores = part if scores is None else scores + part
    assert scores is not None
    return scores


def _rows(gallery: Gallery, rows: list[int]) -> Iterator[tuple[Tensor, Features]]:
    if rows:
        yield torch.tensor(rows), read_rows(gallery, rows)[1]


def _candidates(gallery: Gallery, queries: Features, query: int, count: int, condition: str | None) -> list[int]:
    """Row numbers, in the order of the rows."""
    column = ann_column(gallery)
    if not has_index(gallery):
        raise GalleryError(f"{gallery.path} has no index for --ann: build it with tbps-index ... --ann")
    with explained(gallery.path):
        vector = queries[gallery.features[0].name][query].float().numpy()
        search = gallery.table.search(vector, vector_column_name=column)
        search = (
            search.distance_type("dot")
            .limit(count)
            .nprobes(max(20, count // 8))
            .with_row_id(True)
            .select(["_distance"])
        )
        if condition:
            search = search.where(condition, prefilter=True)
        return sorted(search.to_arrow()["_rowid"].to_pylist())


def ann_column(gallery: Gallery) -> str:
    """The column that the database's index is made of."""
    return "ann" if len(gallery.features[0].shape) > 1 else gallery.features[0].name


def has_index(gallery: Gallery) -> bool:
    """Whether there is an index for `ann`."""
    with explained(gallery.path):
        return any(ann_column(gallery) in index.columns for index in gallery.table.list_indices())
