"""The losses: stored values of the released code, and naive loops in float64 with their gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmlfa.objectives import compute_cmpm, compute_id, compute_itc, compute_mlm, compute_sdm


@pytest.mark.golden("cmlfa", kind="losses")
def test_values_and_gradients(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors, tolerance = case.tensors(), case.case["tolerance"]
    calls: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
        "cmpm": (lambda v, t: compute_cmpm(v, t, tensors["pid"]), ("v", "t")),
        "id": (lambda image, text: compute_id(image, text, tensors["id_labels"]), ("img_logits", "txt_logits")),
        "mlm": (lambda scores: compute_mlm(scores, tensors["mlm_labels"]), ("mlm_scores",)),
    }
    for scale in case.case["scales"]:
        calls[f"sdm_{scale}"] = (lambda v, t, s=scale: compute_sdm(v, t, tensors["pid"], s), ("v", "t"))
        calls[f"itc_{scale}"] = (lambda v, t, s=scale: compute_itc(v, t, s), ("v", "t"))
    assert set(calls) == set(case.case["values"])
    for name, (loss, inputs) in calls.items():
        leaves = [tensors[key].clone().requires_grad_() for key in inputs]
        value = loss(*leaves)
        assert value.item() == pytest.approx(case.case["values"][name], rel=tolerance["rel"], abs=tolerance["abs"])
        value.backward()
        for key, leaf in zip(inputs, leaves):
            assert leaf.grad is not None
            difference = (leaf.grad - tensors[f"grad_{name}_{key}"]).abs().max()
            assert difference < tolerance["grad_abs"], (name, key)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)
    return image, text, torch.tensor([4, 1, 4, 0, 1, 4, 9])


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(value - top) for value in row)
    return [math.exp(value - top) / total for value in row]


def naive_kl(logits: list[list[float]], target: list[list[float]]) -> float:
    total = 0.0
    for row, goal in zip(logits, target):
        total += sum(p * (math.log(p) - math.log(q + 1e-8)) for p, q in zip(softmax(row), goal))
    return total / len(logits)


def test_sdm_is_the_kl_divergence_of_both_directions(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, pid = pair
    n, scale = len(pid), 9.0
    same = [[float(pid[i] == pid[j]) for j in range(n)] for i in range(n)]
    target = [[value / sum(row) for value in row] for row in same]
    text_rows = [[scale * cosine(text[i], image[j]) for j in range(n)] for i in range(n)]
    image_rows = [[scale * cosine(image[i], text[j]) for j in range(n)] for i in range(n)]
    expected = naive_kl(text_rows, target) + naive_kl(image_rows, target)
    assert compute_sdm(image, text, pid, scale).item() == pytest.approx(expected, rel=1e-12)


def test_cmpm_projects_unnormalised_features(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, pid = pair
    n = len(pid)
    same = [[float(pid[i] == pid[j]) for j in range(n)] for i in range(n)]
    target = [[same[i][j] / math.sqrt(sum(same[j])) for j in range(n)] for i in range(n)]

    def project(rows: Tensor, others: Tensor) -> list[list[float]]:
        return [[cosine(a, b) * math.sqrt(float(a @ a)) for b in others] for a in rows]

    expected = naive_kl(project(image, text), target) + naive_kl(project(text, image), target)
    assert compute_cmpm(image, text, pid).item() == pytest.approx(expected, rel=1e-12)


def test_itc_takes_other_captions_of_the_same_person_as_negatives(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, _ = pair
    n, scale = len(image), 9.0
    expected = 0.0
    for i in range(n):
        expected -= math.log(softmax([scale * cosine(image[i], text[j]) for j in range(n)])[i]) / n / 2
        expected -= math.log(softmax([scale * cosine(text[i], image[j]) for j in range(n)])[i]) / n / 2
    assert compute_itc(image, text, scale).item() == pytest.approx(expected, rel=1e-12)


def test_id_is_the_mean_of_two_cross_entropies() -> None:
    image, text = torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.tensor([5, 0, 2, 2])
    expected = 0.0
    for row in range(4):
        for logits in (image, text):
            expected -= math.log(softmax(logits[row].tolist())[labels[row]]) / 8
    assert compute_id(image, text, labels).item() == pytest.approx(expected, rel=1e-12)


def test_mlm_averages_over_the_labelled_positions_only() -> None:
    scores = torch.randn(2, 3, 7, dtype=torch.float64)
    labels = torch.tensor([[0, 4, 0], [6, 0, 2]])
    expected = 0.0
    for i, j in ((0, 1), (1, 0), (1, 2)):
        expected -= math.log(softmax(scores[i, j].tolist())[labels[i, j]]) / 3
    assert compute_mlm(scores, labels).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_agree_with_finite_differences(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, pid = (tensor.clone() for tensor in pair)
    for loss in (
        lambda v, t: compute_sdm(v, t, pid, 9.0),
        lambda v, t: compute_itc(v, t, 9.0),
        lambda v, t: compute_cmpm(v, t, pid),
    ):
        assert torch.autograd.gradcheck(loss, (image.requires_grad_(), text.requires_grad_()))


def test_losses_do_not_depend_on_the_order_of_the_pairs(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, pid = pair
    order = torch.randperm(len(pid))
    for loss in (
        lambda v, t, y: compute_sdm(v, t, y, 50.0),
        lambda v, t, y: compute_itc(v, t, 50.0),
        compute_cmpm,
    ):
        shuffled = loss(image[order], text[order], pid[order])
        assert shuffled.item() == pytest.approx(loss(image, text, pid).item(), rel=1e-12)
