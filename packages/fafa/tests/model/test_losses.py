"""Each loss against its formula, element by element in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fafa.losses import (
    DistributionUncertainty,
    FeatureDispersionLoss,
    HardNegativeNCE,
    MaskedFeaturePrediction,
    compute_sdm,
    contrastive_loss,
    coral_loss,
    mmd_loss,
    pool_tokens,
    token_similarity,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_similarity_is_the_mean_of_the_best_tokens() -> None:
    query, targets = normal(3, 4), normal(5, 6, 4, seed=1)
    similarity = token_similarity(query, targets)
    assert similarity.shape == (3, 5, 6)
    for k in range(1, 9):
        pooled = pool_tokens(similarity, k)
        for i in range(3):
            for j in range(5):
                cosines = sorted((float(query[i] @ targets[j, t]) for t in range(6)), reverse=True)[:k]
                assert pooled[i, j].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
    assert torch.equal(pool_tokens(similarity, 4, soft=False), similarity.amax(-1))


@pytest.mark.parametrize("factor", [1, 0.5])
@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [1, 1, 2, 1], [5, 5, 5, 5]])
def test_sdm_is_two_divergences(ids: list[int], factor: float) -> None:
    logits, count = 3 * normal(4, 4), 4
    labels = [[1.0 if i == j else factor * (ids[i] == ids[j]) for j in range(count)] for i in range(count)]
    total = 0.0
    for matrix in (logits, logits.t()):
        for i in range(count):
            weights = [math.exp(matrix[i, j]) for j in range(count)]
            for j in range(count):
                p = weights[j] / sum(weights)
                total += p * (math.log(p) - math.log(labels[i][j] / sum(labels[i]) + 1e-8)) / count / 2
    actual = compute_sdm(logits, torch.tensor(ids), factor=factor)
    assert actual.item() == pytest.approx(total, rel=1e-5)  # labels are float32
    assert torch.equal(actual, compute_sdm(logits, torch.tensor(ids)[:, None], factor=factor))


def test_contrastive_loss_is_the_cross_entropy_of_the_diagonal() -> None:
    logits = normal(5, 5)
    expected = -torch.log_softmax(logits, 1).diagonal().mean()
    torch.testing.assert_close(contrastive_loss(logits), expected)


def test_dispersion_counts_every_pair_above_the_margin() -> None:
    features, margin = normal(2, 3, 4), 0.1
    tokens = features.reshape(6, 4).tolist()
    total = 0.0
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            dot = sum(x * y for x, y in zip(a, b))
            cosine = -1.0 if i == j else dot / math.hypot(*a) / math.hypot(*b)
            total += max(cosine - margin, 0.0) / 36
    assert FeatureDispersionLoss(margin)(features).item() == pytest.approx(total, rel=1e-12)


def test_dispersion_samples_tokens_and_takes_given_ones() -> None:
    features = normal(4, 5, 6)
    loss = FeatureDispersionLoss(0.0, sample_size=7)
    torch.manual_seed(3)
    drawn = loss(features)
    torch.manual_seed(3)
    indices = torch.randperm(20)[:7]
    assert torch.equal(drawn, loss(features, indices))
    chosen = features.reshape(20, 6)[indices][None]
    assert torch.equal(drawn, FeatureDispersionLoss(0.0)(chosen))
    # Given indices count even where all tokens would fit.
    assert torch.equal(FeatureDispersionLoss(0.0)(features, indices), drawn)


def test_dispersion_stays_in_float32_under_autocast() -> None:
    features = normal(2, 3, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FeatureDispersionLoss(0.1)(features)
    assert inside.dtype == torch.float32 and torch.equal(inside, FeatureDispersionLoss(0.1)(features))


def test_dispersion_of_zero_tokens_is_finite() -> None:
    features = torch.zeros(2, 3, 4, requires_grad=True)
    FeatureDispersionLoss(-0.5)(features).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_masked_prediction_is_the_error_of_the_hidden_elements() -> None:
    module = MaskedFeaturePrediction(3, hidden_dim=5).double()
    a, b = normal(2, 3), normal(2, 3, seed=1)
    mask_a, mask_b = torch.tensor([[1.0, 0, 0], [1, 1, 0]]), torch.tensor([[0.0, 0, 1], [0, 0, 0]])
    first, second = module.predictor[0], module.predictor[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)

    def one_side(x: Tensor, y: Tensor, mask: Tensor) -> float:
        joined = torch.cat([x * (1 - mask), y], 1)
        hidden = (joined @ first.weight.t() + first.bias).clamp(min=0)
        predicted = hidden @ second.weight.t() + second.bias
        errors = [(predicted[i, j] - x[i, j]).item() ** 2 for i in range(2) for j in range(3) if mask[i, j]]
        return sum(errors) / len(errors)

    expected = (one_side(a, b, mask_a) + one_side(b, a, mask_b)) / 2
    assert module(a, b, mask_a, mask_b).item() == pytest.approx(expected, rel=1e-10)


def test_masked_prediction_draws_a_then_b_and_bears_an_empty_mask() -> None:
    module = MaskedFeaturePrediction(4, mask_ratio=0.3, hidden_dim=5)
    a, b = normal(6, 4).float(), normal(6, 4, seed=1).float()
    torch.manual_seed(0)
    drawn = module(a, b)
    torch.manual_seed(0)
    mask_a, mask_b = (torch.rand(6, 4) < 0.3 for _ in range(2))
    assert torch.equal(drawn, module(a, b, mask_a, mask_b))
    assert module(a, b, torch.zeros(6, 4), torch.zeros(6, 4)).item() == 0.0


def test_uncertainty_moves_statistics_by_their_spread() -> None:
    x, n1, n2 = normal(4, 3, 2), normal(3, 2, seed=1), normal(3, 2, seed=2)
    module = DistributionUncertainty(p=0.8, eps=1e-6)
    actual = module(x, gate=0.8, eps_beta=n1, eps_gamma=n2)

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    mu = [[sum(x[:, t, h].tolist()) / 4 for h in range(2)] for t in range(3)]
    sigma = [[math.sqrt(variance(x[:, t, h].tolist()) + 1e-6) for h in range(2)] for t in range(3)]
    for h in range(2):
        spread_mu = math.sqrt(variance([mu[t][h] for t in range(3)]) + 1e-6)
        spread_sigma = math.sqrt(variance([sigma[t][h] for t in range(3)]) + 1e-6)
        for t in range(3):
            beta, gamma = mu[t][h] + n1[t, h] * spread_mu, sigma[t][h] + n2[t, h] * spread_sigma
            for b in range(4):
                expected = (x[b, t, h] - mu[t][h]) / sigma[t][h] * gamma + beta
                assert actual[b, t, h].item() == pytest.approx(expected.item(), abs=1e-10)


def test_uncertainty_has_its_gate_and_is_for_training_alone() -> None:
    module, x = DistributionUncertainty(p=0.5), normal(4, 3, 2)
    assert module(x, gate=0.51) is x
    assert module(x[:1], gate=0.0).shape == (1, 3, 2) and torch.equal(module(x[:1], gate=0.0), x[:1])
    np.random.seed(0)
    first = np.random.random()
    np.random.seed(0)
    assert (module(x) is x) == (first > 0.5)
    assert module.eval()(x, gate=0.0) is x


def test_uncertainty_keeps_gradients_of_all_statistics() -> None:
    module, x = DistributionUncertainty(), normal(4, 3, 2).requires_grad_()
    n1, n2 = normal(3, 2, seed=1), normal(3, 2, seed=2)
    assert torch.autograd.gradcheck(lambda value: module(value, 0.0, n1, n2), (x,))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_hard_negative_nce_keeps_the_released_weights(alpha: float) -> None:
    z, n, beta = normal(4, 4).tolist(), 4, 0.5
    rows = [sum(math.exp(beta * z[j][k]) for k in range(n) if k != j) for j in range(n)]
    columns = [sum(math.exp(beta * z[k][j]) for k in range(n) if k != j) for j in range(n)]

    def weight(i: int, j: int, total: float) -> float:
        return alpha if i == j else (n - 1) * math.exp(beta * z[i][j]) / total

    expected = 0.0
    for i in range(n):
        over_row = sum(math.exp(z[i][j]) * weight(i, j, rows[j]) for j in range(n))
        over_column = sum(math.exp(z[j][i]) * weight(j, i, columns[i]) for j in range(n))
        expected += (math.log(over_row) - z[i][i] + math.log(over_column) - z[i][i]) / n
    actual = HardNegativeNCE(alpha, beta)(torch.tensor(z, dtype=torch.float64))
    assert actual.item() == pytest.approx(expected, rel=1e-10)


def test_hard_negative_nce_bears_logits_of_a_small_temperature() -> None:
    logits = (200 * normal(6, 6).float()).requires_grad_()
    loss = HardNegativeNCE()(logits)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_mmd_and_coral_follow_their_formulas() -> None:
    x, y = normal(4, 3), normal(5, 3, seed=1)

    def kernel(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-0.7 * float(((p - q) ** 2).sum())) for p in a for q in b) / len(a) / len(b)

    expected = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    assert mmd_loss(x, y, gamma=0.7).item() == pytest.approx(expected, rel=1e-10)
    assert mmd_loss(x, x).item() == pytest.approx(0.0, abs=1e-12)
    difference = torch.from_numpy(np.cov(x.numpy().T) - np.cov(y.numpy().T))
    assert coral_loss(x, y).item() == pytest.approx(((difference**2).sum() / 36).item(), rel=1e-10)
    for loss in (mmd_loss, coral_loss):
        inputs = (x.clone().requires_grad_(), y.clone().requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs)
