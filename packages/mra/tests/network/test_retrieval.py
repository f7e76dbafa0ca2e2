"""Encoding, re-ranking and metrics: reference numbers, the direct form, and independence of batches and processes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mra.retrieval.rerank as rerank_module
from mra import (
    Retrieval,
    RetrievalTestDataset,
    build_tokenizer,
    encode_images,
    encode_texts,
    itm_rerank,
    retrieval_metrics,
    tokenize,
)
from mra.retrieval import evaluate_split, write_reports
from mra.retrieval.rerank import Matcher, Pairs, match_logits


@pytest.mark.golden("mra", kind="rerank")
def test_scores(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    from safetensors.torch import load_file

    model = Retrieval(case.case["config"], init_backbones=False).eval()
    model.load_state_dict(load_file(case.folder.parent / case.case["weights_from"] / "weights.safetensors"))
    inputs, expected = case.tensors("inputs.safetensors"), case.tensors("expected.safetensors")
    images = (inputs["image_u8"].float() / 255 - 0.45) / 0.25
    text_embeds, text_feats = encode_texts(model, inputs["text_ids"], inputs["text_atts"], batch_size=3)
    image_embeds, image_feats = encode_images(model, images, batch_size=4)
    mirrored = None
    if case.case["hflip"]:
        mirrored, mirrored_feats = encode_images(model, images.flip(-1), batch_size=4)
        image_feats = (image_feats + mirrored_feats) / 2
    sims = text_feats @ image_feats.t()
    tolerance = case.case["tolerance"]
    assert (sims - expected["sims"]).abs().max() <= tolerance["sims"]
    arguments = (model, sims, image_embeds, text_embeds, inputs["text_atts"], case.case["k"], mirrored)
    for world in case.case["worlds"]:
        scores, wanted = itm_rerank(*arguments, score_world=world), expected[f"scores_world{world}"]
        # The stated tolerances of the specification, not the looser ones of the file.
        assert (scores - wanted).abs().max() <= (1e-4 if world == 1 else 2e-6)
        order = expected[f"order_world{world}"]
        ranked = wanted.gather(1, order)
        clear = (ranked[:, :-1] - ranked[:, 1:]).min(dim=1).values > 2e-6
        assert torch.equal(scores.argsort(dim=1, descending=True, stable=True)[clear], order[clear])


@pytest.mark.golden("mra", kind="metrics")
def test_metrics(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    scores = case.tensors("inputs.safetensors")
    for number, item in enumerate(case.case["cases"]):
        found = retrieval_metrics(scores[f"sim_{number}"], item["g_pids"], item["q_pids"])
        assert found == pytest.approx(item["out"], abs=case.case["tolerance"])


def test_metrics_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (9, 14), generator=generator).float()  # many equal scores
    g_pids = [f"p{number % 4}" for number in range(14)]
    q_pids = [f"p{number % 4}" for number in range(8)] + ["nobody"]
    hits, precision, last = {1: [], 5: [], 10: []}, [], []
    for row, pid in zip(scores.tolist(), q_pids[:8]):
        order = sorted(range(14), key=lambda place: (-row[place], place))
        correct = [g_pids[place] == pid for place in order]
        for k, values in hits.items():
            values.append(any(correct[:k]))
        places = [place for place, right in enumerate(correct) if right]
        precision.append(sum((i + 1) / (place + 1) for i, place in enumerate(places)) / len(places))
        last.append(len(places) / (places[-1] + 1))
    expected = {f"R{k}": 100 * sum(values) / 8 for k, values in hits.items()}
    expected |= {"mAP": 100 * sum(precision) / 8, "mINP": 100 * sum(last) / 8}
    assert retrieval_metrics(scores, g_pids, q_pids) == pytest.approx(expected)
    assert retrieval_metrics(scores, torch.arange(14) % 4, torch.arange(9) % 4 + 0)["R10"] > 0


def test_metrics_of_queries_without_an_image(caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    with caplog.at_level(logging.WARNING):
        assert retrieval_metrics(scores, [1, 2], [2, 7])["R1"] == 100
    assert "1 of 2 captions" in caplog.text
    with pytest.raises(ValueError, match="positive"):
        retrieval_metrics(scores, [1, 2], [8, 9])


@torch.no_grad()
def encoded(net: Any, queries: int = 9, images: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of images and of texts with lengths from 1 to T, one of them with a gap, and similarities."""
    generator = torch.Generator().manual_seed(seed)
    tokens, vision = net.settings.max_tokens, net.settings.vision
    lengths = torch.randint(1, tokens + 1, (queries, 1), generator=generator)
    atts = (torch.arange(tokens) < lengths).long()
    atts[0] = 1
    ids = torch.randint(5, 114, (queries, tokens), generator=generator) * atts
    text_embeds = net.get_text_embeds(ids, atts)
    image_embeds = torch.randn(images, 1 + vision.num_tokens, vision.feature_width, generator=generator)
    return image_embeds, text_embeds, atts, torch.randn(queries, images, generator=generator)


@torch.no_grad()
def direct_logits(net: Any, candidates: Tensor, image_embeds: Tensor, text_embeds: Tensor, atts: Tensor) -> Tensor:
    """One caption at a time against its images, all tokens through all layers."""
    rows = []
    for query, chosen in enumerate(candidates):
        images = image_embeds[chosen]
        ones = torch.ones(images.shape[:2], dtype=torch.long)
        text = text_embeds[query].repeat(len(chosen), 1, 1)
        fused = net.get_cross_embeds(images, ones, text, atts[query].repeat(len(chosen), 1))
        rows.append(net.itm_head(fused[:, 0])[:, 1])
    return torch.stack(rows)


@pytest.mark.parametrize("task", ["sda", "cuhk", "rstp"])
@pytest.mark.parametrize("tokens", [1, 30, 100_000])
def test_logits_are_those_of_the_direct_form(
    model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, task: str, tokens: int
) -> None:
    """With budgets from one pair to all of them, and chunks of images that do not divide the gallery."""
    monkeypatch.setattr(rerank_module, "IMAGE_CHUNK", 4)
    net = model(task)
    image_embeds, text_embeds, atts, sims = encoded(net)
    atts[3, 1] = 0  # a gap
    candidates = sims.topk(7, dim=1).indices
    found = match_logits(Matcher(net, text_embeds, atts, tokens=tokens), candidates, image_embeds)
    expected = direct_logits(net, candidates, image_embeds, text_embeds, atts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_of_a_single_fusion_layer(model: Callable[..., Any], config: Callable[..., Any]) -> None:
    text = {**config("cuhk")["text_config"], "fusion_layer": 11}
    net = model("cuhk", text_config=text)
    image_embeds, text_embeds, atts, sims = encoded(net)
    candidates = sims.topk(3, dim=1).indices
    found = match_logits(Matcher(net, text_embeds, atts), candidates, image_embeds)
    torch.testing.assert_close(found, direct_logits(net, candidates, image_embeds, text_embeds, atts))


def test_memory_that_runs_out_halves_the_batches(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("cuhk")
    image_embeds, text_embeds, atts, sims = encoded(net)
    candidates = sims.topk(7, dim=1).indices
    expected = match_logits(Matcher(net, text_embeds, atts), candidates, image_embeds)
    judge, sizes = Matcher.judge, []

    def small_memory(self: Matcher, keys: Any, images: Tensor, queries: Tensor) -> Tensor:
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return judge(self, keys, images, queries)

    monkeypatch.setattr(Matcher, "judge", small_memory)
    found = match_logits(Matcher(net, text_embeds, atts), candidates, image_embeds)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert max(sizes) > 5 and min(sizes) <= 5
    monkeypatch.setattr(Matcher, "judge", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory at all")))
    with pytest.raises(torch.OutOfMemoryError):
        match_logits(Matcher(net, text_embeds, atts), candidates, image_embeds)


def test_pairs_by_image() -> None:
    candidates = torch.tensor([[3, 0], [0, 2], [3, 2]])
    pairs = Pairs(candidates)
    positions, images, queries = pairs.of_images(2, 4)
    assert images.tolist() == [0, 0, 1, 1] and queries.tolist() == [1, 2, 0, 2]
    assert torch.equal(candidates.flatten()[positions], images + 2)
    assert all(len(part) == 0 for part in pairs.of_images(1, 2))


def test_rerank_of_fewer_images_than_asked_for_ranks_them_all(model: Callable[..., Any]) -> None:
    net = model("cuhk")
    image_embeds, text_embeds, atts, sims = encoded(net)
    scores = itm_rerank(net, sims, image_embeds, text_embeds, atts, k=512)
    logits = direct_logits(net, torch.arange(11).repeat(9, 1), image_embeds, text_embeds, atts)
    expected = (logits - logits.min()) / (logits.max() - logits.min())
    expected += 0.002 * (sims - sims.min()) / (sims.max() - sims.min())
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_encoding_does_not_depend_on_the_batches(model: Callable[..., Any], batch: Callable[..., Any]) -> None:
    net = model("cuhk")
    inputs = batch(net)
    for encode, arguments in (
        (encode_texts, (inputs["text_ids"], inputs["text_atts"])),
        (encode_images, (inputs["image"],)),
    ):
        embeds, features = encode(net, *arguments)
        assert not features.requires_grad
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
        for one, other in zip((embeds, features), encode(net, *arguments, batch_size=3)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_evaluation_of_a_split(
    model: Callable[..., Any], config: Callable[..., Any], split: Path, tmp_path: Path
) -> None:
    """The whole way from files to tables agrees with its parts put together by hand."""
    settings = config("cuhk", image_root=str(split / "images"))
    net = model("cuhk").train()
    dataset = RetrievalTestDataset(str(split / "test.json"), settings)
    tokenizer = build_tokenizer(split / "bert")
    result = evaluate_split(net, dataset, tokenizer, settings, device=torch.device("cpu"), score_world=4, num_workers=0)
    assert net.training
    net.eval()
    ids, atts = tokenize(tokenizer, dataset.text, settings["max_tokens"])
    text_embeds, text_feats = encode_texts(net, ids, atts)
    images, mirrored = (torch.stack([item[view] for item in map(dataset.__getitem__, range(23))]) for view in (0, 1))
    (embeds, feats), (hembeds, hfeats) = encode_images(net, images), encode_images(net, mirrored)
    sims = text_feats @ ((feats + hfeats) / 2).t()
    scores = itm_rerank(net, sims, embeds, text_embeds, atts, settings["k_test"], hembeds, score_world=4)
    for part, matrix in ((result.itc, sims), (result.itm, scores)):
        expected = retrieval_metrics(matrix, dataset.g_pids, dataset.q_pids)
        assert {name: part.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert (result.queries, result.gallery) == (34, 23) and result.settings["score_world"] == 4
    assert [line for line in str(result.itm.table()).splitlines() if "t2i" in line]
    files = write_reports(tmp_path, result, dataset, name="a split", split="test", checkpoint="some.pth")
    assert all(file.stat().st_size > 500 for file in files)
    from tbps_common.report import read_evaluation

    document = read_evaluation(files[0])
    assert document["metrics"]["t2i"]["R1"] == result.itm.metrics["R1"] and document["package"] == "mra"


def test_processes_share_an_evaluation_without_changing_a_bit(
    model: Callable[..., Any], config: Callable[..., Any], group: Callable[..., Any], split: Path, tmp_path: Path
) -> None:
    net = model("cuhk")
    work = {
        "what": "evaluate",
        "config": config("cuhk", image_root=str(split / "images"), batch_size_test=12, batch_size_test_text=20),
        "state": net.state_dict(),
        "test_file": str(split / "test.json"),
        "text_encoder": str(split / "bert"),
        "score_world": 4,
    }
    # Two batches of images and of captions: the third process has none of its own.
    jobs = [{**work, "world": world} for world in (1, 2, 3)] + [{**work, "world": 2, "stop_at": 3}]
    (alone,), pair, three, stopped = group(jobs, tmp_path)
    for answer in [*pair, *three]:
        for name in ("itc", "itm"):
            assert answer[name]["metrics"] == alone[name]["metrics"]
            assert torch.equal(answer[name]["scores"], alone[name]["scores"])
            assert torch.equal(answer[name]["indices"], alone[name]["indices"])
    assert stopped == [{"stopped_at": 3}] * 2
