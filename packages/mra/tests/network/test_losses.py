"""Each loss against its formula in float64 loops, and the distribution of the drawn negatives."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mra.losses import contrastive_loss, draw_negatives, matching_loss, negative_weights
from tbps_common.errors import InputError


def features(count: int = 5, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    unit = torch.nn.functional.normalize
    return unit(image, dim=1), unit(text, dim=1), torch.tensor([3, 1, 3, 2, 1])[:count]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_contrastive_loss_is_the_formula(smoothing: float) -> None:
    image, text, ids = features()
    temp, count = 0.1, len(ids)
    expected = 0.0
    for anchors, others in ((image, text), (text, image)):
        for i in range(count):
            scores = torch.stack([anchors[i] @ others[j] / temp for j in range(count)])
            log_shares = scores - scores.exp().sum().log()
            same = [float(ids[i] == ids[j]) for j in range(count)]
            for j in range(count):
                target = (1 - smoothing) * same[j] / sum(same) + smoothing / count
                expected -= target * log_shares[j].item() / count / 2
    found = contrastive_loss(image, text, ids, torch.tensor(temp), smoothing)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-5)


def test_weights_are_the_formula() -> None:
    image, text, ids = features()
    for found, anchors, others in zip(
        negative_weights(image, text, ids, torch.tensor(0.1)), (image, text), (text, image)
    ):
        for i in range(5):
            shares = torch.softmax(others @ anchors[i] / 0.1, 0) + 1e-5
            expected = torch.where(ids == ids[i], 0.0, shares)
            torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-7)


def test_draws_have_the_distribution_of_the_weights() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 1.0, 3.0, 1e-5], [2.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    draws = 40_000
    counts = torch.zeros(4, 4)
    rows = torch.stack([draw_negatives(weights) for _ in range(draws)])
    for row in range(4):
        counts[row] = rows[:, row].bincount(minlength=4)
    expected = weights / weights.sum(dim=1, keepdim=True)
    expected[2] = torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3  # no weight at all: any other position
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * deviation + 1e-12).all()
    assert (counts[expected == 0] == 0).all()


def test_a_batch_of_one_has_no_negative() -> None:
    with pytest.raises(InputError, match="--bs"):
        draw_negatives(torch.zeros(1, 1))


def test_a_batch_of_one_person_draws_other_positions_and_warns_once(
    model: Callable[..., Any], batch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    net = model("cuhk").train()
    inputs = batch(net)
    inputs["idx"] = torch.full((4,), 5)
    with caplog.at_level(logging.WARNING, logger="mra.model"):
        for _ in range(2):
            assert all(torch.isfinite(loss) for loss in net(**inputs))
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "one person" in caplog.records[0].message


def test_drawn_negatives_are_of_other_people(model: Callable[..., Any], batch: Callable[..., Any]) -> None:
    net = model("cuhk")
    idx = batch(net)["idx"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        image_neg, text_neg = net.drawn_negatives(*(torch.randn(4, 16, generator=generator) for _ in range(2)), idx)
        assert (idx[image_neg] != idx).all() and (idx[text_neg] != idx).all()


def test_matching_loss_is_cross_entropy_of_one_third_matches() -> None:
    logits = torch.randn(12, 2, dtype=torch.float64)
    log_shares = logits - logits.exp().sum(dim=1, keepdim=True).log()
    expected = -(log_shares[:4, 1].sum() + log_shares[4:, 0].sum()) / 12
    torch.testing.assert_close(matching_loss(logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_losses_under_bfloat16_autocast_stay_close_and_finite(
    model: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    net = model("sda").train()
    inputs = batch(net)
    negatives = {name: (torch.tensor([1, 2, 1, 1]), torch.tensor([3, 0, 0, 2])) for name in ("main", "region")}
    reference = torch.stack(net(**inputs, negatives=negatives))
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack(net(**inputs, negatives=negatives))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference, rtol=0.1, atol=0.1)
    losses.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())
