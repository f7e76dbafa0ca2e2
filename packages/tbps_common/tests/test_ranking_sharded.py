"""One gallery on 1, 2, 3 and 4 real processes (gloo): every process returns what one process alone returns."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tbps_common.ranking import evaluate_rows, rerank, retrieve, score_rows

PROGRAM = Path(__file__).with_name("ranking_group.py")


def run_cases(folder, cases, world=4):
    """Answers `[process][case]`; `None` where a process had no shard."""
    torch.save(cases, folder / "work.pt")
    command = [sys.executable, str(PROGRAM), str(world), str(folder)]
    subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=360, check=True)
    return [torch.load(folder / f"answers.{rank}.pt", weights_only=True) for rank in range(world)]


def assert_same(answer, result):
    assert answer.get("error") is None, answer
    assert answer["metrics"] == result.metrics
    for name in ("cmc", "ap", "inp", "first_rank", "indices", "scores"):
        expected = getattr(result, name)
        if expected is not None:
            torch.testing.assert_close(answer[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)
    assert (answer["num_queries"], answer["num_missing"]) == (result.num_queries, result.num_missing)


@pytest.fixture(scope="module")
def tied():
    """Scores of which about a third are tied within their row, with one query that has no positive."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(23, 101, generator=generator)
    tied = torch.rand(scores.shape, generator=generator) < 0.4
    scores[tied] = (scores[tied] * 2).round() / 2
    q_pids = torch.randint(0, 9, (23,), generator=generator)
    q_pids[4] = 99
    return {"scores": scores, "q_pids": q_pids, "g_pids": torch.randint(0, 9, (101,), generator=generator)}


@pytest.fixture(scope="module")
def answers(tied, tmp_path_factory):
    """All faultless and faulty cases in one launch, because starting the processes is what takes time."""
    options = {"on_missing": "miss", "topk": 12}
    ok = [
        dict(tied, shards=shards, options=dict(options, row_budget=budget), name="same")
        for shards in ([101], [50, 51], [7, 1, 93], [30, 0, 41, 30])
        for budget in (1, 7 * 4 * 101, 64 * 4 * 101, None)
    ]
    two = dict(tied, shards=[60, 41], options=dict(options, row_budget=10 * 4 * 60))
    faults = [
        dict(two, name="memory", fault={"rank": 1, "kind": "memory", "calls": [2, 3]}),
        dict(two, name="nan", fault={"rank": 1, "kind": "nan", "calls": [1]}),
        dict(two, name="other", fault={"rank": 0, "kind": "other", "calls": [2]}),
        dict(two, name="options", options_of_rank={1: {"topk": 3}}),
        dict(two, name="row_budget of one", options_of_rank={1: {"row_budget": 1}}),
        dict(two, name="bad option of one", options_of_rank={0: {"topk": -1}}),
        dict(two, name="missing", options={}),
    ]
    query = torch.nn.functional.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    features = {"query": query, "gallery": query[[0, 1, 2, 3, 4, 5, 6, 7, 8, 0]], "q_pids": torch.arange(9)}
    features.update(g_pids=torch.tensor([*range(9), 0]), shards=[4, 6], options={})
    faults.append(dict(features, name="features", fault={"rank": 0}))
    cases = ok + faults
    found = run_cases(tmp_path_factory.mktemp("group"), cases)
    return [(case, [process[number] for process in found]) for number, case in enumerate(cases)]


def test_every_process_returns_the_result_of_one(tied, answers):
    result = evaluate_rows(
        lambda start, stop: tied["scores"][start:stop], tied["q_pids"], tied["g_pids"], topk=12, on_missing="miss"
    )
    checked = 0
    for case, found in answers:
        if case["name"] in {"same", "memory", "row_budget of one"}:
            for answer in found[: len(case["shards"])]:
                assert_same(answer, result)
                checked += 1
    assert checked == 4 * (1 + 2 + 3 + 4) + 2 + 2


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("nan", (1, "InputError", "queries 0 to"), (0, "RuntimeError", "Another process")),
        ("other", (0, "KeyError", "simulated"), (1, "RuntimeError", "Another process")),
        ("options", (0, "InputError", "topk must be the same"), (1, "InputError", "topk must be the same")),
        ("bad option of one", (0, "ValueError", "topk must be at least 0"), (1, "RuntimeError", "Another process")),
        ("missing", (0, "InputError", "1 of 23 queries"), (1, "InputError", "1 of 23 queries")),
        ("features", (0, "InputError", "gallery_feats holds NaN"), (1, "RuntimeError", "Another process")),
    ],
)
def test_a_failure_of_one_is_told_by_all(answers, name, own, other):
    (found,) = [found for case, found in answers if case["name"] == name]
    for rank, error, words in (own, other):
        assert found[rank].get("error") == error, found[rank]
        assert words in found[rank]["message"]


@pytest.mark.golden("tbps_common")
def test_stored_shards(golden, tmp_path):
    cases, stored = [], []
    for name in ("sharded_dot", "sharded_ties"):
        case, tensors = golden(name).case, golden(name).tensors()
        inputs = {key: tensors[key] for key in ("query", "gallery", "q_pids", "g_pids")}
        options = {key: case[key] for key in ("reduce", "k", "max_rank", "topk")}
        for shards in case["shards"]:
            cases.append(dict(inputs, shards=shards, options=options))
            stored.append((case, tensors))
        alone = retrieve(inputs["query"], inputs["gallery"], inputs["q_pids"], inputs["g_pids"], **options)
        torch.testing.assert_close(alone.indices, tensors["expected_indices"])
    found = run_cases(tmp_path, cases, world=3)
    for number, (case, tensors) in enumerate(stored):
        for process in found[: len(cases[number]["shards"])]:
            answer, tolerance = process[number], case["tolerance"]
            assert answer.get("error") is None, answer
            for name, value in case["expected"]["metrics"].items():
                assert answer["metrics"][name] == pytest.approx(value, abs=tolerance["metrics_abs_percent"])
            np.testing.assert_allclose(answer["cmc"], case["expected"]["cmc"], atol=tolerance["metrics_abs_percent"])
            torch.testing.assert_close(answer["indices"], tensors["expected_indices"], rtol=0, atol=0)
            torch.testing.assert_close(answer["first_rank"], tensors["expected_first_rank"], rtol=0, atol=0)
            for name in ("ap", "inp"):
                expected = tensors[f"expected_{name}"]
                torch.testing.assert_close(answer[name], expected, rtol=0, atol=tolerance["vector_abs"])


@pytest.mark.parametrize("kind", ["tokens", "rerank"])
def test_features_stay_where_they_are(kind, tmp_path):
    """FAFA's evaluation (means of the best tokens, queries without a match) and MRA's (re-ranking), in shards."""
    generator = torch.Generator().manual_seed(8)
    shape = (61, 7, 32) if kind == "tokens" else (61, 32)
    inputs = {
        "query": torch.randn(19, 32, generator=generator),
        "gallery": torch.randn(shape, generator=generator),
        "q_pids": torch.arange(19) % 6,
        "g_pids": torch.randint(0, 6, (61,), generator=generator),
    }
    inputs["gallery"][40:50] = inputs["gallery"][3]  # equal pictures, in other shards
    if kind == "tokens":
        inputs["q_pids"][5] = 99
        options = {"reduce": "topk_mean", "k": 3, "on_missing": "miss", "topk": 12}
        alone = retrieve(*(inputs[name] for name in ("query", "gallery", "q_pids", "g_pids")), **options)
    else:
        inputs["itm"], options = torch.randn(19, 9, generator=generator), {}
        rows = score_rows(inputs["query"], inputs["gallery"])
        first = evaluate_rows(rows, inputs["q_pids"], inputs["g_pids"], topk=9)
        fused = rerank(rows(0, 19), first.indices, inputs["itm"])
        alone = evaluate_rows(lambda a, b: fused[a:b], inputs["q_pids"], inputs["g_pids"])
    cases = [dict(inputs, shards=shards, options=options) for shards in ([61], [30, 31], [58, 0, 3])]
    found = run_cases(tmp_path, cases, world=3)
    for number, case in enumerate(cases):
        for process in found[: len(case["shards"])]:
            assert_same(process[number], alone)


def test_group_needs_torch_distributed(tied):
    with pytest.raises(ValueError, match="torch.distributed"):
        evaluate_rows(lambda a, b: tied["scores"][a:b], tied["q_pids"], tied["g_pids"], group=object())
