"""The model against stored outputs of the released code."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diana import DiaNAConfig, DiaNAModel


def close(found: Any, expected: Any, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), **tolerance)


@pytest.mark.golden("diana", kind="model")
def test_features_attributes_and_similarity(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model, inputs, expected = (
        golden_model(case),
        case.tensors("inputs.safetensors"),
        case.tensors("expected.safetensors"),
    )
    with torch.no_grad():
        image, image_tokens = model.encode_image(inputs["pixel_values"])
        text, text_tokens = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        image_attrs, text_attrs = model.refine(image_tokens), model.refine(text_tokens, inputs["attention_mask"])
        found = {
            "image_embeds": image,
            "image_dense": image_tokens,
            "text_embeds": text,
            "text_dense": text_tokens,
            "image_attrs": image_attrs,
            "text_attrs": text_attrs,
            "refine_sim_t2i": model.refine_sim(text_attrs, image_attrs),
        }
    for name, value in found.items():
        close(value, expected[name], case.case["tolerance"])


@pytest.mark.golden("diana", kind="model")
def test_losses_and_gradients(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model, expected = golden_model(case), case.tensors("expected.safetensors")
    output = model(**case.tensors("inputs.safetensors"))
    for name in ("loss", "loss_itc", "loss_sdm", "loss_refine", "logit_scale"):
        if name in expected:
            close(getattr(output, name), expected[name], case.case["tolerance"])
        else:
            assert getattr(output, name) is None
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in case.case["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=5e-3, abs=1e-6), name
    by_short_name = {name.replace(".", "_"): parameter for name, parameter in parameters.items()}
    for name, gradient in expected.items():
        if name.startswith("grad__"):
            short = name.removeprefix("grad__")
            owner = by_short_name.get(short, by_short_name.get(f"refiner_{short}"))
            assert owner is not None, f"no parameter is named {short}"
            torch.testing.assert_close(owner.grad, gradient, rtol=5e-3, atol=1e-3)


@pytest.mark.golden("diana", kind="model")
def test_names_and_shapes_are_those_of_the_checkpoint(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    model = DiaNAModel(DiaNAConfig(**case.case["config"]))
    weights = case.tensors("weights.safetensors")
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }


@pytest.mark.golden("diana", kind="model")
def test_padding_does_not_change_a_feature(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model, inputs, expected = (
        golden_model(case),
        case.tensors("inputs.safetensors"),
        case.tensors("expected.safetensors"),
    )
    with torch.no_grad():
        for ids, mask, feature in zip(inputs["input_ids"], inputs["attention_mask"], expected["text_embeds"]):
            real = int(mask.sum())
            close(model.encode_text(ids[None, :real], mask[None, :real])[0][0], feature, case.case["tolerance"])


@pytest.mark.golden("diana", kind="no_refiner")
def test_without_refiner(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model = golden_model(case, prefixes=("llama", "logit", "text", "vision"))
    assert sorted(model.state_dict()) == sorted(case.case["keys"])
    output = model(**golden("model_a").tensors("inputs.safetensors"))
    assert output.loss_refine is None and case.case["loss_refine"] is None
    for name in ("loss", "loss_itc", "loss_sdm"):
        close(getattr(output, name).detach(), case.case[name], case.case["tolerance"])


@pytest.mark.golden("diana", kind="drop_path")
def test_drop_path_draws_as_the_released_code(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model, inputs = golden_model(case).train(), golden("model_a").tensors("inputs.safetensors")
    torch.manual_seed(case.case["seed"])
    output = model(**inputs)
    for name in ("loss", "loss_itc", "loss_sdm", "loss_refine"):
        close(getattr(output, name).detach(), case.case[name], case.case["tolerance"])
    torch.manual_seed(case.case["seed"])
    pooled = model.vision_model(inputs["pixel_values"]).pooler_output
    close(pooled.detach(), case.tensors("expected.safetensors")["pooled"], case.case["tolerance"])


@pytest.mark.golden("diana", kind="lora")
def test_adapters(golden: Any, golden_name: str, golden_model: Any) -> None:
    case = golden(golden_name)
    model, expected = golden_model(case, strict=False), case.tensors("expected.safetensors")
    own = {name for name in model.state_dict() if name.startswith("llama.")}
    assert own == {name for name in case.tensors("weights.safetensors") if name.startswith("llama.")}
    trainable = [name for name, value in model.named_parameters() if value.requires_grad and name.startswith("llama.")]
    assert len(trainable) == case.case["n_trainable_llama"] and all("lora_" in name for name in trainable)
    inputs = golden("model_a").tensors("inputs.safetensors")
    for merged in (False, True):
        if merged:
            model.merge_lora()
        with torch.no_grad():
            embeds, dense = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        close(embeds, expected["text_embeds"], case.case["tolerance"])
        close(dense, expected["text_dense"], case.case["tolerance"])


@pytest.mark.golden("diana", kind="loading")
def test_a_released_folder_loads(golden: Any, golden_name: str, caplog: pytest.LogCaptureFixture) -> None:
    case, stored = golden(golden_name), golden("model_a")
    folder: Path = case.folder / case.case["checkpoint"]
    model = DiaNAModel.from_pretrained(folder)
    assert "refiner.attr_query_token" in caplog.text and len(caplog.records) == 1
    weights = stored.tensors("weights.safetensors")
    for name, value in model.state_dict().items():
        if name != "refiner.attr_query_token":
            assert torch.equal(value, weights[name]), name
    queries = model.refiner.attr_query_token
    assert queries.shape[1] == case.case["num_query"]
    assert queries.std().item() == pytest.approx(case.case["query_std"], rel=0.3)
    inputs, expected = stored.tensors("inputs.safetensors"), stored.tensors("expected.safetensors")
    with torch.no_grad():
        close(model.encode_image(inputs["pixel_values"])[0], expected["image_embeds"], case.case["tolerance"])
        text = model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0]
    close(text, expected["text_embeds"], case.case["tolerance"])
