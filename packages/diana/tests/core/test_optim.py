"""Parameter groups against stored lists and against the rule."""

from typing import Any

import pytest
import torch

from diana.optim import decay_parameter_names, layer_decay_groups


@pytest.mark.golden("diana", kind="param_groups")
def test_stored_groups(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name).case
    model = golden_model(golden("model_a"))
    decay = decay_parameter_names(model)
    assert sorted(decay) == sorted(case["decay"])
    assert sorted({name for name, _ in model.named_parameters()} - decay) == sorted(case["no_decay"])
    custom = case["custom"]
    groups = layer_decay_groups(model, custom["lr"], custom["weight_decay"], custom["vit_rate"], custom["llama_rate"])
    found = {group["group_name"]: group for group in groups}
    assert len(found) == len(groups) == len(custom["groups"])
    parameters = dict(model.named_parameters())
    for expected in custom["groups"]:
        group = found[expected["group_name"]]
        assert sorted(group["param_names"]) == sorted(expected["param_names"])
        for name in ("weight_decay", "lr", "lr_scale"):
            assert group[name] == pytest.approx(expected[name], rel=1e-12)
        assert all(parameters[name] is value for name, value in zip(group["param_names"], group["params"], strict=True))


def test_every_trainable_parameter_is_in_one_group(tiny_model: Any) -> None:
    model = tiny_model(use_llama_lora=2)
    groups = layer_decay_groups(model, 1e-3, 0.1, vit_rate=0.5, llama_rate=0.5)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
    torch.optim.AdamW(groups)
    by_name = {name: group for group in groups for name in group["param_names"]}
    adapter = "llama.base_model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert by_name[adapter]["group_name"] == "llama_layer_2_decay" and by_name[adapter]["lr"] == 0.5e-3
    assert by_name["text_projection.weight"]["group_name"] == "other_layer_0_decay"
    assert all(group["lr_scale"] <= 1 for group in layer_decay_groups(model, 1e-3, 0.1, llama_rate=0.5))


def test_norms_and_biases_do_not_decay(tiny_model: Any) -> None:
    model = tiny_model()
    decay = decay_parameter_names(model)
    assert {"logit_scale", "refiner.attr_query_token", "llama.embed_tokens.weight", "text_projection.weight"} <= decay
    for name, value in model.named_parameters():
        if "bias" in name or "norm" in name or ".ln_" in name:
            assert name not in decay
        elif value.dim() > 1:
            assert name in decay, name
