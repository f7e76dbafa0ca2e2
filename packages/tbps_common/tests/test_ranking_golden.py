"""Ranking against stored float64 results of a full stable sort, and against the formulas of the released IRRA code."""

import numpy as np
import pytest
import torch

from tbps_common.ranking import evaluate_rows, rank, rerank, rerank_rows, retrieve, score_rows, similarity


def check_result(result, expected, tolerance, tensors=None):
    for name, value in expected["metrics"].items():
        assert result.metrics[name] == pytest.approx(value, abs=tolerance["metrics_abs_percent"]), name
    np.testing.assert_allclose(result.cmc, expected["cmc"], atol=tolerance["metrics_abs_percent"])
    if tensors is not None:
        torch.testing.assert_close(result.indices, tensors["expected_indices"], rtol=0, atol=0)
    if tensors is not None and tolerance["vector_abs"] is not None:
        for name in ("ap", "inp"):
            np.testing.assert_allclose(
                getattr(result, name), tensors[f"expected_{name}"], rtol=0, atol=tolerance["vector_abs"]
            )
        torch.testing.assert_close(result.first_rank, tensors["expected_first_rank"], rtol=0, atol=0)


@pytest.mark.golden("tbps_common", kind="rank")
def test_score_matrix(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    scores, q_pids, g_pids = (tensors[name] for name in ("similarity", "q_pids", "g_pids"))

    def evaluate(on_missing):
        return evaluate_rows(
            lambda start, stop: scores[start:stop],
            q_pids,
            g_pids,
            topk=case["topk"],
            max_rank=case["max_rank"],
            on_missing=on_missing,
        )

    if "skip" in case["expected"]:
        with pytest.raises(ValueError, match=str(case["expected"]["num_missing"])):
            rank(scores, q_pids, g_pids)
        skipped, missed = evaluate("skip"), evaluate("miss")
        assert skipped.num_missing == missed.num_missing == case["expected"]["num_missing"]
        check_result(skipped, case["expected"]["skip"], case["tolerance"], tensors)
        check_result(missed, case["expected"]["miss"], case["tolerance"])
        return
    check_result(evaluate("error"), case["expected"], case["tolerance"], tensors)
    cmc, mean_ap, mean_inp, indices = rank(scores, q_pids, g_pids, max_rank=case["max_rank"])
    expected, percent = case["expected"], case["tolerance"]["metrics_abs_percent"]
    np.testing.assert_allclose(cmc.numpy(), expected["cmc"], atol=percent)
    assert float(mean_ap) == pytest.approx(expected["metrics"]["mAP"], abs=percent)
    assert float(mean_inp) == pytest.approx(expected["metrics"]["mINP"], abs=percent)
    torch.testing.assert_close(indices, tensors["expected_indices"])
    short, short_indices = rank(scores, q_pids, g_pids, max_rank=case["max_rank"], get_mAP=False)
    torch.testing.assert_close(short, cmc)
    torch.testing.assert_close(short_indices, indices)


@pytest.mark.golden("tbps_common", kind="retrieve")
def test_features(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    query, gallery = tensors["query"], tensors["gallery"]
    scores = similarity(query, gallery, reduce=case["reduce"], k=case["k"])
    np.testing.assert_allclose(
        scores.double(), tensors["expected_similarity"], rtol=0, atol=case["tolerance"]["similarity_abs"]
    )
    for row_budget in case["row_budgets"]:
        result = retrieve(
            query,
            gallery,
            tensors["q_pids"],
            tensors["g_pids"],
            reduce=case["reduce"],
            k=case["k"],
            topk=case["topk"],
            max_rank=case["max_rank"],
            row_budget=row_budget,
        )
        check_result(result, case["expected"], case["tolerance"], tensors)


@pytest.mark.golden("tbps_common", kind="sum")
def test_global_plus_local(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    whole = score_rows(tensors["query_global"], tensors["gallery_global"])
    local = score_rows(tensors["query_attr"], tensors["gallery_attr"], reduce="attr_avg")
    result = evaluate_rows(
        lambda start, stop: whole(start, stop) + local(start, stop),
        tensors["q_pids"],
        tensors["g_pids"],
        topk=case["topk"],
        max_rank=case["max_rank"],
        row_budget=2000,
    )
    check_result(result, case["expected"], case["tolerance"], tensors)


@pytest.mark.golden("tbps_common", kind="rerank")
def test_rerank(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    sims, q_pids, g_pids = (tensors[name] for name in ("sims", "q_pids", "g_pids"))
    options = {
        "itm_flip": tensors.get("itm_flip"),
        "weight": case["weight"],
        "legacy_world_size": case["legacy_world_size"],
    }
    fused = rerank(sims, tensors["topk_index"], tensors["itm"], **options)
    np.testing.assert_allclose(fused.double(), tensors["expected_scores"], rtol=0, atol=case["tolerance"]["scores_abs"])
    streamed = rerank_rows(
        lambda start, stop: sims[start:stop],
        sims.shape[1],
        tensors["topk_index"],
        tensors["itm"],
        row_budget=sims.shape[1] * 4 * 5,
        **options,
    )
    for rows in (streamed, lambda start, stop: fused[start:stop]):
        result = evaluate_rows(rows, q_pids, g_pids, topk=case["topk"], max_rank=case["max_rank"])
        # float32 may leave scores tied that float64 tells apart: then the metrics have a tolerance and the order none
        exact = case["tolerance"]["vector_abs"] is not None
        check_result(result, case["expected"], case["tolerance"], tensors if exact else None)


@pytest.mark.golden("tbps_common_datasets", kind="metrics")
def test_released_family_formulas(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    scores, q_pids, g_pids = (tensors[name] for name in ("similarity", "q_pids", "g_pids"))
    percent = case["tolerance"]["abs"]
    cmc, mean_ap, mean_inp, indices = rank(scores, q_pids, g_pids)
    np.testing.assert_allclose(cmc, case["cmc"], atol=percent)
    assert mean_ap.item() == pytest.approx(case["mAP"], abs=percent)
    assert mean_inp.item() == pytest.approx(case["mINP"], abs=percent)
    torch.testing.assert_close(indices, tensors["indices"][:, :10].long())
    torch.testing.assert_close(rank(scores, q_pids, g_pids, full_indices=True)[3], tensors["indices"].long())
    np.testing.assert_allclose(rank(scores, q_pids, g_pids, max_rank=5)[0], case["cmc_rank5"], atol=percent)
    top_cmc, top = rank(scores, q_pids, g_pids, 10, False)
    np.testing.assert_allclose(top_cmc, case["cmc_top"], atol=percent)
    torch.testing.assert_close(top, tensors["indices_top10"].long())


@pytest.mark.golden("cmlfa", kind="metrics")
def test_cmlfa_metrics(golden, golden_name):
    stored = golden(golden_name)
    case, tensors = stored.case, stored.tensors()
    cmc, mean_ap, mean_inp, indices = rank(tensors["similarity"], tensors["q_pids"], tensors["g_pids"])
    np.testing.assert_allclose(cmc, case["cmc"], atol=case["tolerance"]["abs"])
    assert mean_ap.item() == pytest.approx(case["mAP"], abs=case["tolerance"]["abs"])
    assert mean_inp.item() == pytest.approx(case["mINP"], abs=case["tolerance"]["abs"])
    torch.testing.assert_close(indices, tensors["indices"][:, :10].long())
