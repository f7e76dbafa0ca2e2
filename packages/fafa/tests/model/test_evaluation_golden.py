"""Ranking and the whole ITCPR evaluation against stored numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fafa import Blip2FAFACPR
from fafa.checkpoint import load_checkpoint
from fafa.evaluation import (
    batchwise_similarity,
    compute_itcpr_val_metrics,
    compute_ticpr_val_metrics,
    rank,
    retrieval,
    sweep,
    topk_mean_similarity,
)
from fafa.processors import BlipCaptionProcessor


@pytest.mark.golden("fafa", prefix="ranking")
def test_similarity_and_metrics(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    case, tensors, tolerance = stored.case, stored.tensors(), stored.case["tolerance"]
    queries, gallery, q_ids, g_ids = (tensors[name] for name in ("qfeats", "gfeats", "q_pids", "g_pids"))

    def close(actual: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(actual, tensors[f"expected.{name}"], atol=tolerance["atol"], rtol=tolerance["rtol"])

    part = tensors["expected.sim3"]
    close(batchwise_similarity(queries, gallery, batch_size=5)[: len(part), : part.shape[1]], "sim3")
    similarity = topk_mean_similarity(queries, gallery, case["k"])
    close(similarity, "similarity")
    close(topk_mean_similarity(queries, gallery, 1), "max_similarity")
    cmc, mean_ap, mean_inp, indices = rank(similarity, q_ids, g_ids, max_rank=case["max_rank"], full_indices=True)
    metrics = tolerance["metrics_atol"]
    torch.testing.assert_close(cmc, tensors["expected.cmc"], atol=metrics, rtol=0)
    torch.testing.assert_close(mean_ap, tensors["expected.mAP"], atol=metrics, rtol=0)
    torch.testing.assert_close(mean_inp, tensors["expected.mINP"], atol=metrics, rtol=0)
    assert torch.equal(indices, tensors["expected.indices"])
    cmc, indices = rank(similarity, q_ids, g_ids, max_rank=case["max_rank_noap"], get_mAP=False)
    torch.testing.assert_close(cmc, tensors["expected.cmc_noap"], atol=metrics, rtol=0)
    assert torch.equal(indices, tensors["expected.indices_noap"])
    for result in (
        retrieval(queries, gallery, q_ids, g_ids, case["k"]),
        sweep(queries, gallery, q_ids, g_ids, [1, case["k"]])[case["k"]],
    ):
        assert result.metrics["mAP"] == pytest.approx(tensors["expected.mAP"].item(), abs=metrics)
        assert result.metrics["mINP"] == pytest.approx(tensors["expected.mINP"].item(), abs=metrics)


@pytest.mark.golden("fafa", prefix="itcpr_eval")
def test_from_pictures_to_percentages(golden: Callable[..., Any], case_name: str) -> None:
    from fafa.data import GalleryDataset, ITCPRDataset, QueryDataset
    from fafa.transforms import squarepad_transform_test

    stored = golden(case_name)
    case, tensors = stored.case, stored.tensors()
    model = Blip2FAFACPR.from_config({**case["config"], "tokenizer": str(stored.folder / "vocab.txt")}).eval()
    result = load_checkpoint(model, stored.folder / case["weights"], strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    model.fda_k = case["fda_k"]
    data = ITCPRDataset(str(stored.folder / case["itcpr_root"]), verbose=False)
    transform = squarepad_transform_test(case["config"]["image_size"])
    queries = QueryDataset(data.query["instance_ids"], data.query["img_paths"], data.query["captions"], transform)
    gallery = GalleryDataset(data.gallery["instance_ids"], data.gallery["img_paths"], transform)
    text = {"eval": BlipCaptionProcessor()}
    for soft, expected in ((True, case["expected_soft"]), (False, case["expected_hard"])):
        actual = compute_itcpr_val_metrics(model, queries, gallery, text, soft=soft, batch_size=4, num_workers=0)
        assert actual == pytest.approx(expected, abs=case["tolerance"]["metrics_atol"])
    captions = [text["eval"](caption) for caption in data.query["captions"]]
    images = torch.stack([queries[index][1] for index in range(len(queries))])
    query = model.extract_features({"image": images, "text_input": captions}).multimodal_embeds
    assert query is not None
    atol = case["tolerance"]["atol"]
    torch.testing.assert_close(query, tensors["expected.qfeats"], atol=atol, rtol=0)
    pictures = torch.stack([gallery[index][1] for index in range(len(gallery))])
    features, _ = model.extract_target_features(pictures)
    similarity = topk_mean_similarity(query, features, model.fda_k)
    torch.testing.assert_close(similarity, tensors["expected.similarity"], atol=atol, rtol=0)
    assert compute_ticpr_val_metrics is compute_itcpr_val_metrics
