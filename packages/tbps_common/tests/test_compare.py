"""Comparing models: metrics against a recomputation in float64, intervals, and files of queries."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tbps_common.errors import InputError
from tbps_common.search.compare import (
    Way,
    answers_of,
    asker_of,
    bootstrap,
    evaluate,
    ways_to_ask,
)
from tbps_common.search.index import list_pictures, update_gallery
from tbps_common.search.queries import Asked, read_queries
from tbps_common.search.retriever import Feature, Features, Query, Retriever

PICTURES, WIDTH = 40, 16


def table_model(pictures: Tensor, sentences: Tensor) -> Retriever:
    """Picture number i, painted in the i-th shade of red, has the i-th row; the sentence "7" has the 7th row."""

    def encode_images(batch: Tensor) -> Features:
        return {"feature": pictures[batch]}

    def encode_queries(queries: Sequence[Query]) -> Features:
        if queries[0].image is not None:
            return encode_images(torch.stack([number(query.image) for query in queries if query.image is not None]))
        return {"feature": sentences[torch.tensor([int(query.text.split()[-1]) for query in queries])]}

    def judge(query: Query, found: Sequence[Image.Image], scores: Tensor, lowest: float) -> Tensor:
        return torch.arange(len(found)).float()  # the last of them is the best

    return Retriever(
        name="table:random",
        queries=("text", "image"),
        fingerprint="a" * 64,
        features=(Feature("feature", (pictures.shape[1],)),),
        device=torch.device("cpu"),
        transform=number,
        encode_images=encode_images,
        encode_queries=encode_queries,
        batch_size=7,
        judge=judge,
    )


def number(image: Image.Image) -> Tensor:
    return torch.tensor(image.getpixel((0, 0))[0])  # type: ignore[index]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for place in range(PICTURES):
        Image.new("RGB", (2, 2), (place, 0, 0)).save(root / f"{place:02d}.png")
    return root


@pytest.fixture(scope="module")
def model() -> Retriever:
    generator = torch.Generator().manual_seed(3)
    pictures, sentences = torch.randn((2, PICTURES, WIDTH), generator=generator)
    return table_model(pictures, sentences)


@pytest.fixture(scope="module")
def gallery(folder: Path, model: Retriever) -> str:
    out = str(folder.parent / "people.lance")
    update_gallery(out, model, list_pictures(str(folder)))
    return out


def recomputed(scores: np.ndarray, right: set[int]) -> list[float]:
    """R@1, R@5, R@10, AP and INP of one query, from the definitions."""
    order = np.argsort(-scores, kind="stable")
    ranks = [rank for rank, place in enumerate(order, start=1) if place in right]
    ap = sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ranks)
    return [100.0 * value for value in (*(ranks[0] <= k for k in (1, 5, 10)), ap, len(ranks) / ranks[-1])]


def features(model: Retriever, query: Query) -> np.ndarray:
    return model.encode_queries([query])["feature"][0].double().numpy()


def test_metrics_equal_a_recomputation_in_float64(folder: Path, gallery: str, model: Retriever) -> None:
    generator = np.random.default_rng(5)
    asked = [  # their answers overlap in all ways
        Asked(
            f"query {query}",
            text=f"person {query}",
            image=str(folder / f"{(query + 1) % PICTURES:02d}.png"),
            answers=tuple(
                f"{place:02d}.png" for place in generator.choice(PICTURES, size=1 + query % 4, replace=False)
            ),
        )
        for query in range(PICTURES)
    ]
    asker = asker_of(gallery, model)
    answers = answers_of(asked, asker.gallery, asker.pictures, None)
    ways = ways_to_ask(model, "image+text", baselines=True)
    assert [way.label for way in ways] == ["picture alone", "sentence alone", "sum of both"]
    table = np.stack(
        [
            features(model, one.query())
            for one in [Asked("", image=str(folder / f"{p:02d}.png")) for p in range(PICTURES)]
        ]
    )
    for way in ways:
        measured = evaluate(asker, asked, answers, way)
        for one, right, values in zip(asked, answers, measured.values):
            scores = sum(table @ features(model, ask(one.query())) for ask in way.asks)
            assert values.tolist() == pytest.approx(recomputed(np.asarray(scores), set(right)), abs=1e-9)
        assert measured.cmc[0] == pytest.approx(measured.values[:, 0].mean())
        assert measured.cmc[9] == pytest.approx(measured.values[:, 2].mean())
        assert measured.picture_bytes == 4 * WIDTH


def test_a_small_case_by_hand(folder: Path, tmp_path: Path) -> None:
    """Four pictures; the sentence likes them in the order 2, 0, 3, 1, and 0 and 1 are right."""
    small = tmp_path / "small"
    small.mkdir()
    for place in range(4):
        (small / f"{place:02d}.png").write_bytes((folder / f"{place:02d}.png").read_bytes())
    model = table_model(torch.tensor([[3.0], [1.0], [4.0], [2.0]]), torch.tensor([[1.0]]))
    out = str(tmp_path / "people.lance")
    update_gallery(out, model, list_pictures(str(small)))
    asker = asker_of(out, model)
    asked = [Asked("", text="0", answers=("00.png", "01.png"))]
    answers = answers_of(asked, asker.gallery, asker.pictures, None)
    plain, judged = [evaluate(asker, asked, answers, way) for way in ways_to_ask(model, "text", judge=3)]
    assert plain.values[0].tolist() == [0, 100, 100, 50, 50]  # ranks 2 and 4
    # The second stage turns 2, 0, 3 round: ranks 2 and 4 again; of two, ranks 1 and 4.
    assert judged.name == "table:random, re-ranked 3" and judged.values[0].tolist() == [0, 100, 100, 50, 50]
    assert evaluate(asker, asked, answers, Way(judge=2)).values[0].tolist() == [100, 100, 100, 75, 50]


def test_intervals_draw_persons_not_queries() -> None:
    # One person with 99 right queries, one with a single wrong one: with queries as units R@1 could not fall to 0.
    values = np.array([[100.0]] * 99 + [[0.0]])
    persons = ["a"] * 99 + ["b"]
    means = bootstrap(values, persons, resamples=4000, seed=1)
    assert set(np.unique(means)) == {0.0, 99.0, 100.0}
    shares = [np.mean(means == value) for value in (0.0, 99.0, 100.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert np.array_equal(means, bootstrap(values, persons, resamples=4000, seed=1))
    assert not np.array_equal(means, bootstrap(values, persons, resamples=4000, seed=2))
    # A second model is asked by the same persons: a constant difference has no spread.
    other = bootstrap(values - 7, persons, resamples=4000, seed=1)
    assert np.allclose(means - other, 7, atol=1e-9)


def test_models_are_asked_as_they_can_be(model: Retriever) -> None:
    assert ways_to_ask(model, "dialogue") == [] == ways_to_ask(model, "image+text")
    rounds = ([{"from": "gpt", "value": "Who?"}, {"from": "user", "value": "A man."}],) * 2
    ways = ways_to_ask(model, "dialogue", joined=True, judge=4)
    assert [way.label for way in ways] == ["joined dialogue", "joined dialogue re-ranked 4"]
    assert ways[0].asks[0](Query(dialogue=rounds)).text == "A man. A man."
    assert [way.label for way in ways_to_ask(model, "image", judge=4)] == [""]


def test_queries_are_read_from_json_lines_and_csv(tmp_path: Path) -> None:
    rounds = [[{"from": "gpt", "value": "Who?"}, {"from": "user", "value": "A man."}]]
    (tmp_path / "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")
    records = [
        {"text": " a man ", "answers": ["b.png", "a.png"]},
        {"image": "q.png", "text": "with a bag", "identity": 7, "person": "x"},
        {"dialogue": rounds, "identity": "8"},
        {"dialogue": "rounds.json", "identity": "8"},
    ]
    lines = tmp_path / "queries.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    found = read_queries(lines)
    assert [one.kind for one in found] == ["text", "image+text", "dialogue", "dialogue"]
    assert [one.person for one in found] == ["a.png\nb.png", "x", "8", "8"]
    assert found[0].text == "a man" and found[1].image == str(tmp_path / "q.png")
    assert found[2].dialogue == found[3].dialogue == tuple(rounds)
    table = tmp_path / "queries.csv"
    table.write_text(
        'text,image,dialogue,answers,identity,person\n" a\nman ",,,b.png; a.png,,\nwith a bag,q.png,,,7,x\n,,rounds.json,,8,\n',
        encoding="utf-8",
    )
    again = read_queries(table)
    assert [(one.kind, one.answers, one.person) for one in again] == [
        (one.kind, one.answers, one.person) for one in (found[0], found[1], found[2])
    ]
    assert again[0].text == "a\nman"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no queries"),
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"text": "a", "answer": ["b"]}', "unknown field 'answer'"),
        ('{"text": "a"}', "either answers or identity"),
        ('{"text": "a", "answers": ["b"], "identity": "c"}', "either answers or identity"),
        ('{"answers": ["b"]}', "asks nothing"),
        ('{"text": ["a"], "answers": ["b"]}', "text must be a string"),
        ('{"text": "a", "answers": [1]}', "answers must be a list of paths"),
        ('{"text": "a", "answers": 1}', "answers must be a list of paths"),
        ('{"dialogue": [[{"from": "user"}]], "answers": ["b"]}', "dialogue must be a list of rounds"),
        ('{"dialogue": 3, "answers": ["b"]}', "dialogue must be a list of rounds"),
        ('{"dialogue": "absent.json", "answers": ["b"]}', "absent.json cannot be read"),
        ('{"text": "a", "dialogue": [[{"from": "user", "value": "b"}]], "answers": ["b"]}', "stands alone"),
    ],
)
def test_unusable_queries_are_named(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "queries.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as problem:
        read_queries(file)
    assert "queries.jsonl" in str(problem.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.jsonl", "absent.csv", ""):
        with pytest.raises(InputError, match="cannot be read"):
            read_queries(tmp_path / name)
    (tmp_path / "wide.csv").write_text("text,answers\na,b.png,c\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        read_queries(tmp_path / "wide.csv")


def test_answers_outside_the_gallery_are_named(gallery: str, model: Retriever) -> None:
    asker = asker_of(gallery, model, where="path < '10.png'")
    assert len(asker.pictures.keys) == 10
    for one, words in {
        Asked("q, line 4", text="1", answers=("11.png",)): "q, line 4: the answer 11.png is not among",
        Asked("q, line 5", text="1", identity="7"): "q, line 5 has an identity: name the gallery's column",
    }.items():
        with pytest.raises(InputError, match=words):
            answers_of([one], asker.gallery, asker.pictures, None)
    with pytest.raises(InputError, match="--identity pid is not a column of"):
        asker_of(gallery, model, identity="pid")
    with pytest.raises(InputError, match="holds no pictures of table:random that fit --where"):
        asker_of(gallery, model, where="path = 'x'")
