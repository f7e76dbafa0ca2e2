"""The network: what its parts promise, without stored numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diana import DiaNAConfig, DiaNAModel
from diana.model.towers import DropPath, choose_attention
from tbps_common.errors import InputError

Make = Callable[..., DiaNAModel]


def test_padding_outputs_are_a_matter_of_taste(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    model, mask = tiny_model(), batch["attention_mask"]
    with torch.no_grad():
        masked = model.encode_text(batch["input_ids"], mask)
        quick = model.encode_text(batch["input_ids"], mask, padding_outputs=False)
        assert torch.allclose(masked[0], quick[0], atol=1e-5)
        assert torch.allclose(masked[1][mask == 1], quick[1][mask == 1], atol=1e-5)
        assert torch.allclose(model.refine(masked[1], mask), model.refine(quick[1], mask), atol=1e-5)


def test_a_dialogue_feature_depends_on_every_real_token_and_no_other(
    tiny_model: Make, batch: dict[str, torch.Tensor]
) -> None:
    model, ids, mask = tiny_model(), batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        before = model.encode_text(ids, mask)[0]
        changed = ids.clone()
        changed[0, 12] = 7  # padding of the first dialogue
        assert torch.allclose(model.encode_text(changed, mask)[0], before, atol=1e-6)
        changed[0, 1] = (changed[0, 1] + 1) % 250
        assert not torch.allclose(model.encode_text(changed, mask)[0][0], before[0], atol=1e-4)


def test_attention_kernels_agree(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    losses = {}
    for name in ("sdpa", "eager"):
        assert model.set_attention(name) == name
        losses[name] = model(**batch).loss.item()
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    gradients = []
    for on in (False, True):
        model = tiny_model(vision_config={"drop_path_rate": 0.3}).train()
        model.set_gradient_checkpointing(on)
        torch.manual_seed(3)
        model(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name
    model.set_gradient_checkpointing(False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("schedule, rates", [("constant", [0.4] * 5), ("linear", [0.0, 0.1, 0.2, 0.3, 0.4])])
def test_drop_path_schedules(tiny_model: Make, schedule: str, rates: list[float]) -> None:
    model = tiny_model(vision_config={"drop_path_rate": 0.4, "drop_path_schedule": schedule})
    found = [
        block.drop_path.rate if isinstance(block.drop_path, DropPath) else 0.0
        for stage in model.vision_model.encoder.layers
        for block in stage.blocks
    ]
    assert found == pytest.approx(rates)


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, ones = DropPath(0.25).train(), torch.ones(20000, 1, 2)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert layer.eval()(ones) is ones


def test_an_image_of_another_size_than_the_configured_one_is_encoded(tiny_model: Make) -> None:
    with torch.no_grad():
        embeds, dense = tiny_model().encode_image(torch.randn(2, 3, 128, 64))
    assert embeds.shape == (2, 64) and dense.shape == (2, 8, 64)


def test_initialisation(tiny_model: Make) -> None:
    model = tiny_model(refiner_config={"num_query": 200, "num_hidden_layers": 2}, embed_dim=128)
    refiner, width = model.refiner, 128
    deviations = {
        "attr_query_token": 0.02,
        "cross_attn.in_proj_weight": width**-0.5,
        "cross_attn.out_proj.weight": width**-0.5 * 4**-0.5,
        "transformer.resblocks.1.attn.in_proj_weight": width**-0.5,
        "transformer.resblocks.1.attn.out_proj.weight": width**-0.5 * 4**-0.5,
        "transformer.resblocks.0.mlp.c_fc.weight": (2 * width) ** -0.5,
        "transformer.resblocks.0.mlp.c_proj.weight": width**-0.5 * 4**-0.5,
    }
    parameters = dict(refiner.named_parameters())
    for name, deviation in deviations.items():
        assert parameters[name].std().item() == pytest.approx(deviation, rel=0.05), name
    assert model.text_projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.text_projection.bias.any() and not refiner.cross_attn.in_proj_bias.any()
    assert model.logit_scale.exp().item() == pytest.approx(50) and model.logit_scale.shape == ()


def test_lora_on_a_plain_model_changes_nothing_at_first(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    before, names = model(**batch).loss.item(), list(model.state_dict())
    model.add_llama_lora(2)
    assert model(**batch).loss.item() == pytest.approx(before, rel=1e-6)
    assert all(("lora_" in name) == value.requires_grad for name, value in model.llama.named_parameters())
    assert all(value.requires_grad for name, value in model.named_parameters() if not name.startswith("llama."))
    with pytest.raises(InputError, match="already has LoRA adapters of rank 2"):
        model.add_llama_lora(4)
    model.merge_lora()
    assert list(model.state_dict()) == names and model.config.use_llama_lora == 0


def test_the_rotary_frequencies_follow_the_checkpoints_dtype(tiny_model: Make) -> None:
    exact, rounded = tiny_model(), tiny_model(torch_dtype="bfloat16")
    frequencies = [model.llama_tower.rotary_emb.inv_freq for model in (exact, rounded)]
    assert frequencies[1].dtype == torch.float32
    assert torch.equal(frequencies[0].bfloat16().float(), frequencies[1]) and not torch.equal(*frequencies)


def test_no_refiner_no_attributes(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model(refiner_config={"enable_refiner": False})
    assert model.refiner is None and not any(name.startswith("refiner") for name in model.state_dict())
    assert model(**batch).loss_refine is None
    with pytest.raises(InputError, match="no attribute refiner"):
        model.refine(torch.zeros(1, 2, 64))


def test_half_precision_losses_are_computed_in_single(tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    full, half = tiny_model(), tiny_model().to(torch.bfloat16)
    output = half(**batch)
    assert output.loss.dtype == torch.float32
    assert output.loss_itc.item() == pytest.approx(full(**batch).loss_itc.item(), rel=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(**batch).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"embed_dim": 96}, "multiple of 64"),
        ({"vision_config": {"drop_path_rate": 1.0}}, "drop_path_rate"),
        ({"vision_config": {"drop_path_schedule": "cosine"}}, "drop_path_schedule"),
        ({"vision_config": {"depths": "many"}}, "vision_config cannot be used"),
        ({"llama_config": {"num_attention_heads": 5}}, "llama_config cannot be used"),
        ({"use_llama_lora": -1}, "use_llama_lora"),
        ({"logit_scale": 0}, "logit_scale"),
        ({"refiner_config": {"num_query": 0}}, "num_query"),
        ({"torch_dtype": "int8"}, "int8"),
    ],
)
def test_unusable_settings(tiny_config: Callable[..., DiaNAConfig], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DiaNAModel(tiny_config(**changes))


def test_choice_of_the_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr("diana.model.towers.find_spec", lambda name: None)
    assert choose_attention("auto", gpu, half) == "sdpa"
    with pytest.raises(InputError, match="flash-attn"):
        choose_attention("flash_attention_2", gpu, half)
    monkeypatch.setattr("diana.model.towers.find_spec", lambda name: object())
    assert choose_attention("auto", gpu, half) == "flash_attention_2"
    assert choose_attention("auto", gpu, torch.float32) == "sdpa" == choose_attention("auto", cpu, half)
    with pytest.raises(InputError, match="half precision"):
        choose_attention("flash_attention_2", cpu, half)
    with pytest.raises(InputError, match="--attn_implementation"):
        choose_attention("quick", cpu, half)
