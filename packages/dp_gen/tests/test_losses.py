"""The losses against plain loops in float64, and what must hold for them."""

import pytest
import torch

from dp_gen import BalancedL1Loss, attribute_localization_loss
from dp_gen.losses import attribute_region, masked_mse


def attention(batch: int, heads: int, positions: int, length: int = 9) -> torch.Tensor:
    scores = torch.randn(batch * heads, positions, length, dtype=torch.float64)
    return scores.softmax(dim=-1)


def test_localization_loss_is_the_written_formula() -> None:
    torch.manual_seed(0)
    batch, heads, slots = 2, 3, 4
    maps = {"a": attention(batch, heads, 16), "b": attention(batch, heads, 4)}
    seg_maps = (torch.rand(batch, slots, 4, 4) > 0.5).double()
    idx = torch.tensor([[1, 3, 5, 0], [2, 0, 0, 0]])
    used = torch.tensor([[True, True, True, False], [True, False, False, False]])
    layers = []
    for name, side in (("a", 4), ("b", 2)):
        small = torch.nn.functional.interpolate(seg_maps, size=(side, side), mode="bilinear", antialias=True)
        total = 0.0
        for b in range(batch):
            for h in range(heads):
                over = 0.0
                for j in range(slots):
                    p = maps[name][b * heads + h, :, idx[b, j]]
                    s = small[b, j].flatten()
                    outside = (p * (1 - s)).sum() / ((1 - s).sum() + 1e-5)
                    over += float(used[b, j]) * float(outside - (p * s).sum() / (s.sum() + 1e-5))
                total += over / (float(used[b].sum()) + 1e-5)
        layers.append(total / (batch * heads))
    found = attribute_localization_loss(maps, seg_maps, idx, used)
    assert float(found) == pytest.approx(sum(layers) / 2, rel=1e-9)


def test_attention_inside_the_region_is_rewarded_and_unused_slots_are_not_counted() -> None:
    inside = torch.zeros(1, 4, 3)
    inside[0, :2, 1] = 1.0
    region = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    idx, used = torch.tensor([[1]]), torch.tensor([[True]])
    assert float(attribute_localization_loss({"x": inside}, region, idx, used)) == pytest.approx(-1, abs=1e-4)
    assert float(attribute_localization_loss({"x": inside}, 1 - region, idx, used)) == pytest.approx(1, abs=1e-4)
    assert float(attribute_localization_loss({"x": inside}, region, idx, ~used)) == 0


def test_maps_of_any_shape_and_wrong_ones() -> None:
    torch.manual_seed(1)
    seg_maps, idx, used = torch.ones(1, 1, 8, 4), torch.tensor([[2]]), torch.tensor([[True]])
    maps = {"x": attention(1, 2, 8).float()}
    assert attribute_localization_loss(maps, seg_maps, idx, used, spatial_shape={"x": (4, 2)}).isfinite()
    with pytest.raises(ValueError, match="8 positions, not 2 x 2"):
        attribute_localization_loss(maps, seg_maps, idx, used)
    with pytest.raises(ValueError, match="no attention"):
        attribute_localization_loss({}, seg_maps, idx, used)


def test_norm_makes_the_loss_independent_of_the_maps_height() -> None:
    torch.manual_seed(2)
    maps = torch.rand(1, 2, 16, 3) + 0.1
    seg = (torch.rand(1, 2, 16, 3) > 0.5).float()
    loss = BalancedL1Loss(norm=True)
    assert torch.allclose(loss(maps, seg), loss(maps * 50, seg), atol=1e-3)
    assert loss(maps, seg).shape == (1, 2, 3)


def test_masked_mse_counts_the_zeros_outside() -> None:
    prediction, target = torch.full((1, 4, 2, 2), 3.0), torch.ones(1, 4, 2, 2)
    region = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert float(masked_mse(prediction, target)) == 4
    assert float(masked_mse(prediction, target, region)) == 1
    assert float(masked_mse(prediction, target, region / 2)) == 0.25


def test_region_is_the_union() -> None:
    seg_maps = torch.zeros(1, 2, 16, 16)
    seg_maps[0, 0, :8], seg_maps[0, 1, :, :8] = 1, 1
    region = attribute_region(seg_maps, (2, 2))
    assert region.tolist() == [[[[1, 1], [1, 0]]]]
