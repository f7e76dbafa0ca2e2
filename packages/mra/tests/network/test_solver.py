"""Parameter groups by official name, and the multiplier of the learning rate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mra import Retrieval, create_optimizer, lr_multiplier, param_groups
from tbps_common.errors import InputError

RATES = {"opt": "adamW", "lr": 1e-4, "weight_decay": 0.01, "lr_mult": 2, "lr_x": 3}


@pytest.mark.golden("mra", kind="optim")
def test_groups(golden: Any, golden_name: str) -> None:
    for stored in golden(golden_name).case["tasks"].values():
        model = Retrieval(stored["config"], init_backbones=False)
        assert sorted(model.init_params) == sorted(stored["init_params"])
        assert sorted(model.x_params) == sorted(stored["x_params"])
        groups = param_groups(model, stored["optimizer"])
        assert len(groups) == len(stored["groups"])
        for group, expected in zip(groups, stored["groups"]):
            assert sorted(group["names"]) == sorted(expected["names"])
            assert group["lr"] == pytest.approx(expected["lr"], rel=1e-12)
            assert group["weight_decay"] == expected["weight_decay"]
        optimizer = create_optimizer(model, stored["optimizer"])
        assert list(optimizer.defaults["betas"]) == stored["betas"] and optimizer.defaults["eps"] == stored["eps"]


@pytest.mark.golden("mra", kind="schedule")
def test_schedules(golden: Any, golden_name: str) -> None:
    case = golden(golden_name).case
    for series in case["cases"]:
        steps, warmup = series["num_training_steps"], series["num_warmup_steps"]
        found = [lr_multiplier(series["sched"], step, steps, warmup) for step in range(len(series["values"]))]
        assert found == pytest.approx(series["values"], abs=1e-7)


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none(model: Callable[..., Any]) -> None:
    net = model("cuhk")
    groups = param_groups(net, RATES)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in net.parameters())
    names = {name: number for number, group in enumerate(groups) for name in group["names"]}
    assert names["temp"] == 0 and names["vision_proj.0.weight"] == 0  # decayed although not weights of a layer
    assert names["itm_head.1.weight"] == 2 and names["itm_head.0.bias"] == 3
    assert names["vision_encoder.layers.1.blocks.0.attn.relative_position_bias_table"] == 1
    assert names["vision_encoder.layers.2.downsample.norm.weight"] == 3  # of stage 2 by its official name
    assert names["vision_encoder.layers.1.downsample.norm.weight"] == 1
    assert names["text_encoder.bert.embeddings.word_embeddings.weight"] == 0
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4, 3e-4, 3e-4])
    assert not groups[4]["params"] and not groups[5]["params"]
    net.temp.requires_grad_(False)
    assert "temp" not in param_groups(net, RATES)[0]["names"]
    assert {group["lr"] for group in param_groups(net, {"lr": 0.5, "weight_decay": 0})} == {0.5}


def test_create_optimizer_steps_and_its_state_loads(model: Callable[..., Any]) -> None:
    net = model("rstp")
    optimizer = create_optimizer(net, RATES)
    assert isinstance(optimizer, torch.optim.AdamW) and len(optimizer.param_groups) == 6
    assert optimizer.param_groups[0]["lr"] == 1e-4
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = net.temp.item()
    optimizer.step()
    # First step of Adam: the learning rate in the direction of the gradient, and the decay.
    assert net.temp.item() == pytest.approx(before * (1 - 1e-4 * 0.01) - 1e-4, abs=1e-8)
    create_optimizer(net, RATES).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", [{"lr": -1}, {"lr": None}, {"weight_decay": "0.01"}, {"lr_mult": float("nan")}])
def test_impossible_rates(model: Callable[..., Any], change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"optimizer.{next(iter(change))}"):
        param_groups(model("rstp"), {**RATES, **change})


def test_shape_of_the_schedules() -> None:
    # The first step has rate 0, the last one is above it, and beyond the end it stays 0.
    assert lr_multiplier("linear", 0, 10, 4) == 0 and lr_multiplier("linear", 4, 10, 4) == 1
    assert lr_multiplier("linear", 9, 10, 4) == pytest.approx(1 / 6) and lr_multiplier("linear", 99, 10, 4) == 0
    # A float below 1 is a share of the training steps, rounded down; no warm-up starts at 1.
    assert lr_multiplier("step", 1, 109, 0.1) == pytest.approx(1 / 10)
    assert lr_multiplier("linear", 0, 10, 0) == 1 and lr_multiplier("step", 0, 10, 0.0) == pytest.approx(0.2)
    assert lr_multiplier("step", 40, 1000, 10) == pytest.approx(0.5 * 960 / 990)
    assert lr_multiplier("step", 70, 1000, 10) == pytest.approx(0.2 * 930 / 990)
    with pytest.raises(NotImplementedError, match="cosine"):
        lr_multiplier("cosine", 0, 10, 1)
    with pytest.raises(InputError, match="num_warmup_steps"):
        lr_multiplier("linear", 0, 10, 1.5)
