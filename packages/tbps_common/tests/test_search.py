"""Galleries and retrievers, with a model that anybody can compute: the mean colour of a picture."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from tbps_common.errors import InputError
from tbps_common.search.gallery import Gallery, open_gallery
from tbps_common.search.index import Counts, list_pictures, update_gallery
from tbps_common.search.retriever import Feature, Features, Query, Retriever, open_retriever
from tbps_common.search.search import search

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def colour_model(fingerprint: str = "a" * 64, encoded: list[int] | None = None) -> Retriever:
    """Features are mean colours; a query is the name of a colour."""

    def transform(image: Image.Image) -> Tensor:
        return torch.tensor(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))

    def encode_images(pictures: Tensor) -> Features:
        if encoded is not None:
            encoded.append(len(pictures))
        return {"colour": normalize(pictures + 1e-3, dim=1)}

    def encode_queries(queries: Sequence[Query]) -> Features:
        return {"colour": normalize(torch.tensor([COLOURS[query.text] for query in queries]).float(), dim=1)}

    return Retriever(
        name="colour:mean",
        queries=("text",),
        fingerprint=fingerprint,
        features=(Feature("colour", (3,)),),
        device=torch.device("cpu"),
        transform=transform,
        encode_images=encode_images,
        encode_queries=encode_queries,
        batch_size=4,
    )


def paint(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures that turn from red to blue, in two folders."""
    root = tmp_path / "pictures"
    for number in range(10):
        paint(root / ("a" if number < 5 else "b") / f"{number}.png", (255 - 25 * number, 0, 25 * number))
    return root


def index(out: Path, folder: Path | str, model: Retriever | None = None, **options: object) -> Counts:
    return update_gallery(str(out), model or colour_model(), list_pictures(str(folder)), **options)  # type: ignore[arg-type]


def names(gallery: Gallery, text: str, **options: object) -> list[str]:
    hits = search(gallery, colour_model(), [Query(text)], **options)[0]  # type: ignore[arg-type]
    return [os.path.basename(hit.path) for hit in hits]


def test_indexed_pictures_are_found_best_first(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "people.lance"
    assert str(index(out, folder)) == "added 10, updated 0, removed 0, skipped 0, total 10"
    gallery = open_gallery(out, colour_model())
    assert names(gallery, "red", topk=3) == ["0.png", "1.png", "2.png"]
    assert names(gallery, "blue", topk=20) == [f"{number}.png" for number in reversed(range(10))]
    assert names(gallery, "red", topk=3, where="path LIKE 'b/%'") == ["5.png", "6.png", "7.png"]


def test_only_what_changed_is_encoded(tmp_path: Path, folder: Path) -> None:
    out, encoded = tmp_path / "people.lance", []
    index(out, folder)
    model = colour_model(encoded=encoded)
    assert index(out, folder, model) == Counts(total=10)
    paint(folder / "a" / "0.png", (0, 255, 0))
    os.utime(folder / "a" / "0.png", (1, 1))  # older than before
    os.utime(folder / "b" / "9.png", (4e9, 4e9))  # in the future
    (folder / "a" / "1.png").unlink()
    paint(folder / "new.png", (1, 2, 3))
    assert index(out, folder, model) == Counts(added=1, updated=2, removed=1, total=10)
    assert index(out, folder, model) == Counts(total=10)
    assert encoded == [3]
    assert names(open_gallery(out, model), "green", topk=1) == ["0.png"]


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    for name, words in {"clip": "KIND:PLACE", "clop:x": "did you mean clip:x", "clip:": "KIND:PLACE"}.items():
        with pytest.raises(InputError, match=words):
            open_retriever(name)
    with pytest.raises(InputError, match="cannot search with a picture"):
        search(None, colour_model(), [Query(image=Image.new("RGB", (2, 2)))])  # type: ignore[arg-type]
