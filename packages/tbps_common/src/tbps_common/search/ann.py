"""The database's nearest-neighbour index of a gallery, and how many of the right hits it proposes."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from lancedb.index import IvfPq, IvfSq

from tbps_common.errors import InputError
from tbps_common.search.gallery import Gallery, explained, hits_of
from tbps_common.search.rank import ann_column, rank
from tbps_common.search.retriever import Features, Query, Retriever, encode_queries
from tbps_common.search.search import picture_of

# Below this, scoring every picture takes milliseconds.
SMALLEST = 5000
# An index keeps a byte per number; of larger galleries it keeps a byte for every eight, so that it fits memory.
_LARGE = 5_000_000
_QUERIES = 64
_GARMENTS = ("coat", "T-shirt", "jacket", "dress")
_COLOURS = ("red", "black", "white", "blue")


@dataclass(frozen=True)
class Recall:
    """How an index does.

    Attributes:
        share: of the exact `topk` hits of the example queries that are among the candidates.
        topk: hits per query.
        candidates: per query.
        queries: how many.
    """

    share: float
    topk: int
    candidates: int
    queries: int

    def __str__(self) -> str:
        return (
            f"recall@{self.topk} of {self.queries} example queries against exact search: {self.share:.3f} with "
            f"{self.candidates} candidates"
        )


def build_index(gallery: Gallery) -> None:
    """Build the index of a gallery, in place of an older one; pictures that come later are added when they are indexed.

    Raises:
        InputError: the gallery is too small to need one.
        OSError: the disk is full.
    """
    count = len(gallery)
    if count < SMALLEST:
        raise InputError(
            f"--ann: {gallery.path} holds {count} pictures, and an index pays from {SMALLEST} on: leave --ann out, exact "
            "search takes milliseconds"
        )
    column = ann_column(gallery)
    width = gallery.table.schema.field(column).type.list_size
    config: Any = IvfSq(distance_type="dot")
    if count > _LARGE and width % 8 == 0:
        config = IvfPq(distance_type="dot", num_sub_vectors=width // 8)
    with explained(gallery.path):
        gallery.table.checkout_latest()
        gallery.table.create_index(column, config=config, replace=True)


def measure_recall(gallery: Gallery, model: Retriever, *, topk: int = 10, candidates: int = 1000) -> Recall:
    """Compare searches through the index with exact ones, for sentences such as users write.

    Args:
        gallery: with an index.
        model: of the gallery.
        topk: hits per query.
        candidates: per query.
    """
    features = _example_queries(gallery, model)
    exact = rank(gallery, features, topk, device=model.device)[1]
    found = rank(gallery, features, topk, ann=candidates, device=model.device)[1]
    right = sum(len(set(one) & set(other)) for one, other in zip(exact.tolist(), found.tolist()))
    return Recall(right / exact.numel(), topk, candidates, len(exact))


def _example_queries(gallery: Gallery, model: Retriever) -> Features:
    sentences = [
        f"A {person} in a {colour} {garment} and {legs} trousers."
        for person, colour, garment, legs in itertools.product(("man", "woman"), _COLOURS, _GARMENTS, ("black", "grey"))
    ][:_QUERIES]
    if "text" in model.queries:
        return encode_queries(model, [Query(sentence) for sentence in sentences])
    with explained(gallery.path):
        found = gallery.table.search().where("problem IS NULL").select(["key"]).with_row_id(True).to_arrow()
    places = torch.linspace(0, len(found) - 1, _QUERIES).long().tolist()
    hits = hits_of(gallery, found["_rowid"].take(places).to_pylist(), [0.0] * _QUERIES)
    return encode_queries(model, [Query(text, picture_of(hit)) for text, hit in zip(sentences, hits)])
