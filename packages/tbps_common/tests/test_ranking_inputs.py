"""Bad input: the right exception, by the name of the argument, before anything is scored."""

import numpy as np
import pytest
import torch

from tbps_common.ranking import best_of_rows, evaluate_rows, rank, rerank, rerank_rows, retrieve, score_rows

QUERY, GALLERY = torch.eye(3), torch.eye(3)
IDS = [1, 2, 3]


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


CALLS = {
    "nan_query": (lambda: retrieve(with_value(QUERY, np.nan), GALLERY, IDS, IDS), ValueError, "query_feats"),
    "inf_gallery": (lambda: retrieve(QUERY, with_value(GALLERY, np.inf), IDS, IDS), ValueError, "gallery_feats"),
    "nan_similarity": (lambda: rank(with_value(QUERY, np.nan), IDS, IDS), ValueError, "first in query 1"),
    "nan_rows": (
        lambda: evaluate_rows(lambda a, b: with_value(QUERY, np.inf)[a:b], IDS, IDS, row_budget=12),
        ValueError,
        "queries 1 to 1 hold NaN or infinity",
    ),
    "overflow": (
        lambda: retrieve(QUERY * 1e30, GALLERY * 1e30, IDS, IDS),
        ValueError,
        "queries 0 to 2 hold NaN or infinity",
    ),
    "dim_mismatch": (lambda: retrieve(QUERY, torch.ones(3, 4), IDS, IDS), ValueError, "width"),
    "id_length_mismatch": (lambda: retrieve(QUERY, GALLERY, IDS, [1, 2]), ValueError, "g_pids has 2"),
    "id_length_mismatch_rank": (lambda: rank(QUERY, [1, 2], IDS), ValueError, "q_pids has 2"),
    "empty_gallery": (lambda: retrieve(QUERY, torch.ones(0, 3), IDS, []), ValueError, "gallery_feats is empty"),
    "empty_query": (lambda: retrieve(torch.ones(0, 3), GALLERY, [], IDS), ValueError, "query_feats is empty"),
    "empty_similarity": (lambda: rank(torch.ones(0, 3), [], IDS), ValueError, "similarity is empty"),
    "empty_ids": (lambda: evaluate_rows(lambda a, b: QUERY[a:b], [], IDS), ValueError, "q_pids is empty"),
    "empty_gallery_ids": (lambda: evaluate_rows(lambda a, b: QUERY[a:b], IDS, []), ValueError, "g_pids is empty"),
    "float_ids": (lambda: retrieve(QUERY, GALLERY, [1.0, 2.0, 3.0], IDS), TypeError, "q_pids"),
    "bool_ids": (lambda: retrieve(QUERY, GALLERY, IDS, torch.ones(3, dtype=torch.bool)), TypeError, "g_pids"),
    "text_ids": (lambda: retrieve(QUERY, GALLERY, IDS, ["1", "2", "3"]), TypeError, "g_pids"),
    "matrix_ids": (lambda: retrieve(QUERY, GALLERY, np.ones((3, 1), int), IDS), TypeError, "q_pids"),
    "huge_ids": (lambda: retrieve(QUERY, GALLERY, IDS, np.full(3, 2**64 - 1, np.uint64)), ValueError, "g_pids"),
    "unknown_reduce": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, reduce="median"), ValueError, "reduce must be"),
    "k_zero": (lambda: retrieve(QUERY, GALLERY[None], IDS, [1], reduce="topk_mean", k=0), ValueError, "k must be"),
    "k_float": (lambda: retrieve(QUERY, GALLERY[None], IDS, [1], reduce="topk_mean", k=2.0), TypeError, "k must be"),
    "integer_features": (lambda: retrieve(QUERY.long(), GALLERY, IDS, IDS), TypeError, "query_feats"),
    "bool_features": (lambda: retrieve(QUERY, GALLERY.bool(), IDS, IDS), TypeError, "gallery_feats"),
    "array_features": (lambda: retrieve(QUERY.numpy(), GALLERY, IDS, IDS), TypeError, "query_feats"),
    "integer_similarity": (lambda: rank(QUERY.long(), IDS, IDS), TypeError, "similarity"),
    "no_positive_at_all": (lambda: retrieve(QUERY, GALLERY, IDS, [7, 8, 9]), ValueError, "None of the 3 queries"),
    "no_positive_at_all_miss": (
        lambda: retrieve(QUERY, GALLERY, IDS, [7, 8, 9], on_missing="miss"),
        ValueError,
        "None of the 3 queries",
    ),
    "unknown_on_missing": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, on_missing="drop"), ValueError, "on_missing"),
    "unknown_precision": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, precision="fp8"), ValueError, "precision"),
    "negative_topk": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, topk=-1), ValueError, "topk"),
    "max_rank_zero": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, max_rank=0), ValueError, "max_rank"),
    "row_budget_zero": (lambda: retrieve(QUERY, GALLERY, IDS, IDS, row_budget=0), ValueError, "row_budget"),
    "token_gallery_with_dot": (lambda: retrieve(QUERY, GALLERY[None], IDS, [1]), ValueError, "gallery_feats"),
    "single_gallery_with_tokens": (lambda: score_rows(QUERY, GALLERY, reduce="max"), ValueError, "gallery_feats"),
    "attribute_count_mismatch": (
        lambda: score_rows(torch.ones(2, 4, 3), torch.ones(2, 5, 3), reduce="attr_max"),
        ValueError,
        "4 attributes and gallery_feats 5",
    ),
    "no_tokens": (lambda: score_rows(QUERY, torch.ones(2, 0, 3), reduce="max"), ValueError, "empty dimension"),
    "wrong_rows_shape": (lambda: evaluate_rows(lambda a, b: QUERY, IDS, IDS, row_budget=1), ValueError, r"\[1, 3\]"),
    "integer_rows": (lambda: evaluate_rows(lambda a, b: QUERY[a:b].long(), IDS, IDS), TypeError, "rows"),
    "array_rows": (lambda: evaluate_rows(lambda a, b: QUERY[a:b].numpy(), IDS, IDS), TypeError, "rows"),
    "best_of_vector": (lambda: best_of_rows(QUERY[0], 1), ValueError, "scores"),
    "rerank_shape": (
        lambda: rerank(QUERY, torch.tensor([[0], [1]]), torch.ones(2, 1)),
        ValueError,
        "sims has 3 rows but topk_index has 2",
    ),
    "rerank_itm_shape": (
        lambda: rerank(QUERY, torch.tensor([[0], [1], [2]]), torch.ones(3, 2)),
        ValueError,
        "itm must have the shape",
    ),
    "rerank_outside": (lambda: rerank(QUERY, torch.tensor([[0], [3], [2]]), torch.ones(3, 1)), ValueError, "0 to 3"),
    "rerank_twice": (lambda: rerank(QUERY, torch.tensor([[0, 0]] * 3), torch.ones(3, 2)), ValueError, "twice"),
    "rerank_nan": (
        lambda: rerank(QUERY, torch.tensor([[0]] * 3), torch.ones(3, 1), itm_flip=torch.full((3, 1), np.nan)),
        ValueError,
        "itm_flip",
    ),
    "rerank_float_index": (lambda: rerank(QUERY, torch.ones(3, 1), torch.ones(3, 1)), TypeError, "topk_index"),
    "rerank_integer_itm": (
        lambda: rerank(QUERY, torch.tensor([[0]] * 3), torch.ones(3, 1, dtype=torch.long)),
        TypeError,
        "itm",
    ),
    "rerank_rows_shape": (
        lambda: rerank_rows(lambda a, b: QUERY, 4, torch.tensor([[0]] * 3), torch.ones(3, 1)),
        ValueError,
        r"\[3, 4\]",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input(name):
    call, error, words = CALLS[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.golden("tbps_common", kind="errors")
def test_stored_bad_calls(golden, golden_name):
    for stored in golden(golden_name).case["calls"]:
        call, error, _ = CALLS[stored["call"]]
        assert error.__name__ == stored["raises"], stored
        with pytest.raises(error):
            call()


@pytest.mark.parametrize(
    "ids",
    [
        [5, -2, 5],
        (5, -2, 5),
        np.array([5, -2, 5], np.int8),
        np.array([5, -2, 5], np.int64)[::1],
        np.array([9, 5, 9, -2, 9, 5], np.int32)[1::2],
        torch.tensor([5, -2, 5], dtype=torch.int16),
        torch.tensor([5, -2, 5]),
    ],
)
def test_ids_of_any_integer_kind(ids):
    result = retrieve(QUERY, GALLERY, ids, [-2, 5, 5])
    assert result.first_rank.tolist() == [2, 2, 1]


def test_unsigned_ids():
    large = np.array([2**63 - 1, 0, 7], np.uint64)
    assert retrieve(QUERY, GALLERY, large, large).metrics["R1"] == 100.0


def test_importing_the_package_does_not_import_torch():
    import subprocess
    import sys

    program = "import sys, tbps_common.ranking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_public_name_is_there():
    import tbps_common.ranking as ranking

    assert all(callable(getattr(ranking, name)) for name in ranking.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = ranking.nothing_like_it
