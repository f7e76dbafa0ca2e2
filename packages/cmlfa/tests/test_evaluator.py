"""Evaluation: features, metrics, and that the model comes out as it went in."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cmlfa.metrics import METRICS, Evaluator, rank
from cmlfa.model import CMLFA


def batches(ids: torch.Tensor, inputs: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(ids.split(size), inputs.split(size)))


@pytest.mark.golden("cmlfa", kind="evaluator")
def test_stored_features_and_metrics(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model = build_golden_model(golden(case.case["model_case"]))
    tensors, tolerance, size = case.tensors(), case.case["tolerance"], case.case["batch_size"]
    evaluator = Evaluator(
        batches(tensors["image_pids"], tensors["images"], size),
        batches(tensors["caption_pids"], tensors["caption_ids"], size),
    )
    qfeats, gfeats, qids, gids = evaluator.compute_embedding(model)
    assert (qfeats - tensors["qfeats"]).abs().max() < tolerance["features"]
    assert (gfeats - tensors["gfeats"]).abs().max() < tolerance["features"]
    assert torch.equal(qids, tensors["caption_pids"]) and torch.equal(gids, tensors["image_pids"])
    found = evaluator.evaluate(model, i2t_metric=True)
    for task in ("t2i", "i2t"):
        assert found[task] == pytest.approx(case.case[task], abs=tolerance["metrics"])
    assert evaluator.eval(model) == pytest.approx(case.case["t2i"]["R1"], abs=tolerance["metrics"])


@pytest.mark.golden("cmlfa", kind="metrics")
def test_stored_rankings(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors, expected = case.tensors(), case.case
    similarity, q_pids, g_pids = tensors["similarity"], tensors["q_pids"], tensors["g_pids"]
    cmc, mean_ap, mean_inp, indices = rank(similarity, q_pids, g_pids)
    assert cmc.tolist() == pytest.approx(expected["cmc"], abs=1e-3)
    assert float(mean_ap) == pytest.approx(expected["mAP"], abs=1e-3)
    assert float(mean_inp) == pytest.approx(expected["mINP"], abs=1e-3)
    assert torch.equal(indices, tensors["indices"][:, :10])
    cmc, indices = rank(similarity, q_pids, g_pids, get_mAP=False)
    assert cmc.tolist() == pytest.approx(expected["cmc_top"], abs=1e-3)
    assert torch.equal(indices, tensors["indices_top10"])


@pytest.fixture
def small(toy_batch: Callable[..., dict[str, torch.Tensor]]) -> Evaluator:
    batch = toy_batch(6)
    pids = torch.tensor([0, 0, 1, 1, 2, 2])
    return Evaluator(batches(pids, batch["images"], 4), batches(pids, batch["caption_ids"], 4))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_gets_no_gradients(
    toy_model: Callable[..., CMLFA], small: Evaluator, training: bool
) -> None:
    model = toy_model().train(training)
    first, second = small.compute_embedding(model), small.compute_embedding(model)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not first[0].requires_grad
    assert model.training is training


def test_the_mode_is_restored_when_a_loader_fails(toy_model: Callable[..., CMLFA]) -> None:
    def failing() -> Iterator[Any]:
        raise OSError("disk gone")
        yield

    model = toy_model().train()
    with pytest.raises(OSError, match="disk gone"):
        Evaluator(failing(), failing()).evaluate(model)
    assert model.training


def test_the_table_is_logged(
    toy_model: Callable[..., CMLFA], small: Evaluator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "IRRA.eval"):
        metrics = small.evaluate(toy_model(), i2t_metric=True)
    (record,) = [record for record in caplog.records if record.name == "IRRA.eval"]
    lines = record.getMessage().splitlines()
    assert lines[0] == "" and lines[2].replace("|", " ").split() == ["task", *METRICS]
    assert lines[4].replace("|", " ").split() == ["t2i", *(f"{metrics['t2i'][name]:.3f}" for name in METRICS)]
    assert lines[5].replace("|", " ").split()[0] == "i2t"


def test_a_gallery_smaller_than_ten(toy_model: Callable[..., CMLFA], small: Evaluator) -> None:
    metrics = small.evaluate(toy_model())
    assert metrics["t2i"]["R10"] == 100.0


def test_a_caption_without_an_image_is_an_error(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    batch = toy_batch(2)
    evaluator = Evaluator([(torch.tensor([0, 1]), batch["images"])], [(torch.tensor([0, 7]), batch["caption_ids"])])
    with pytest.raises(ValueError, match="positive"):
        evaluator.evaluate(toy_model())
