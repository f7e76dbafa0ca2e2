"""Attribute similarity against stored values and against its definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diana.similarity import SIM_TYPES, attribute_similarity
from tbps_common.errors import InputError


def by_definition(a: torch.Tensor, b: torch.Tensor, sim_type: str) -> torch.Tensor:
    cosines = F.cosine_similarity(a[:, None], b[None], dim=-1, eps=1e-8)  # (N, M, K)
    return {
        "avg": lambda s: s.mean(-1),
        "max": lambda s: s.amax(-1),
        "min": lambda s: s.amin(-1),
        "lsp_max": lambda s: s.logsumexp(-1),
        "lsp_min": lambda s: -(-s).logsumexp(-1),
    }[sim_type](cosines)


@pytest.mark.golden("diana", kind="similarity")
def test_stored_similarities(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    inputs = case.tensors("inputs.safetensors")
    for sim_type, expected in case.tensors("expected.safetensors").items():
        found = attribute_similarity(inputs["a"], inputs["b"], sim_type)
        torch.testing.assert_close(found, expected, **case.case["tolerance"])


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("sim_type", SIM_TYPES)
def test_value_and_gradient_are_those_of_the_definition(sim_type: str, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    weights = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found, expected = attribute_similarity(a, b, sim_type, chunk), by_definition(a, b, sim_type)
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = [torch.autograd.grad((score * weights).sum(), (a, b)) for score in (found, expected)]
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*gradients))


@pytest.mark.parametrize("sim_type", SIM_TYPES)
def test_a_zero_attribute_is_similar_to_nothing(sim_type: str) -> None:
    a, b = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(1, 2, 3)
    score = attribute_similarity(a, b, sim_type)
    score.sum().backward()
    assert torch.allclose(score, by_definition(torch.zeros(1, 2, 3), b, sim_type)) and torch.isfinite(a.grad).all()


@pytest.mark.parametrize("sim_type", SIM_TYPES)
def test_memory_does_not_grow_with_pairs_times_width(sim_type: str) -> None:
    """The largest tensor autograd keeps is an [N, M] matrix or the inputs, never [N, M, K, C]."""
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    a, b = torch.randn(40, 4, 32, requires_grad=True), torch.randn(50, 4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attribute_similarity(a, b, sim_type)
    assert max(sizes) <= 50 * 4 * 32


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "sum"), "sim_type"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)), r"\[2, 2, 4\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "Attributes must be"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "avg", 0), "chunk"),
    ],
)
def test_unusable_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        attribute_similarity(*arguments)
