"""The model against stored outputs of the released code: tokens, slots, features, losses, gradients, three steps."""

from typing import Any

import pytest
import torch

from cmlfa import get_args
from cmlfa.model import official_param_order, resize_pos_embed
from cmlfa.model.safl import SAFL
from cmlfa.solver import build_optimizer

pytestmark = pytest.mark.golden("cmlfa", kind="model")


def golden_batch(tensors: dict[str, torch.Tensor], clean: bool = False) -> dict[str, torch.Tensor]:
    batch = {name: tensors[name] for name in ("images", "pids", "mlm_ids", "mlm_labels")}
    return {**batch, "caption_ids": tensors["clean_ids"] if clean else tensors["mlm_ids"].clone()}


def total(entries: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([value for name, value in entries.items() if "loss" in name]).sum()


@torch.no_grad()
def test_tokens_slots_and_features(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model, expected, tolerance = build_golden_model(case), case.tensors(), case.case["tolerance"]
    images, ids = expected["images"], expected["clean_ids"]
    vision, text = model.image_tokens(images), model.text_tokens(ids)
    found = {
        "image_tokens": vision,
        "text_tokens": text,
        "safl_image": model.safl(vision[:, 1:]),
        "safl_text": model.safl(text),
        "latent_image": model.latent(vision[:, 1:]),
        "latent_text": model.latent(text),
        "feat_image": model.encode_image(images),
        "feat_text": model.encode_text(ids),
    }
    masked = model.text_tokens(expected["mlm_ids"])
    found["cross_former"] = model.cross_former(masked, vision, vision)
    found["mlm_logits_row0"] = model.mlm_head(found["cross_former"][0])
    for name, value in found.items():
        allowed = tolerance["features" if name.startswith(("feat", "latent", "mlm")) else "tokens"]
        assert (value - expected[name]).abs().max() < allowed, name


@torch.no_grad()
def test_features_depend_on_the_batch_as_in_the_released_code(
    golden: Any, golden_name: str, build_golden_model: Any
) -> None:
    case = golden(golden_name)
    model, expected, split = build_golden_model(case), case.tensors(), case.case["split"]
    allowed = case.case["tolerance"]["features"]
    for name, encode, inputs in (
        ("feat_image_split", model.encode_image, expected["images"]),
        ("feat_text_split", model.encode_text, expected["clean_ids"]),
    ):
        in_two_calls = torch.cat([encode(inputs[:split]), encode(inputs[split:])])
        assert (in_two_calls - expected[name]).abs().max() < allowed
        assert (in_two_calls - encode(inputs)).abs().max() > 10 * allowed


@torch.no_grad()
def test_attention_over_parts_is_independent_of_the_batch(
    golden: Any, golden_name: str, build_golden_model: Any
) -> None:
    case = golden(golden_name)
    model, expected = build_golden_model(case, lfa_attention="parts"), case.tensors()
    allowed = case.case["tolerance"]["features"]
    for name, encode, inputs in (
        ("feat_image_parts", model.encode_image, expected["images"]),
        ("feat_text_parts", model.encode_text, expected["clean_ids"]),
    ):
        assert (encode(inputs) - expected[name]).abs().max() < allowed
        one_by_one = torch.cat([encode(row) for row in inputs.split(1)])
        assert (one_by_one - expected[name]).abs().max() < allowed


@pytest.mark.parametrize("clean", [False, True], ids=["masked", "clean"])
def test_losses(golden: Any, golden_name: str, build_golden_model: Any, clean: bool) -> None:
    case = golden(golden_name)
    expected = case.case["forward_clean" if clean else "forward_masked"]
    entries = build_golden_model(case)(golden_batch(case.tensors(), clean))
    relative = case.case["tolerance"]["loss_rel"]
    assert list(entries) == list(expected)
    assert {name: value.item() for name, value in entries.items()} == pytest.approx(expected, rel=relative)
    assert total(entries).item() == pytest.approx(case.case["total_clean" if clean else "total_masked"], rel=relative)


def test_gradients(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model, expected, tolerance = build_golden_model(case), case.tensors(), case.case["tolerance"]
    total(model(golden_batch(expected))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == case.case["no_grad_params"]
    for name, norm in case.case["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(
            norm, rel=tolerance["grad_rel"], abs=tolerance["grad_abs"]
        )
    for name in (name for name in expected if name.startswith("grad.")):
        reference = expected[name]
        allowed = tolerance["grad_abs"] + tolerance["grad_rel"] * reference.abs().max()
        assert (gradients[name.removeprefix("grad.")] - reference).abs().max() < allowed, name


def test_three_optimizer_steps(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model, batch = build_golden_model(case), golden_batch(case.tensors())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = get_args([])
    vars(args).update(case.case["args"])
    optimizer = build_optimizer(args, model)
    trace = []
    for _ in case.case["optimizer_trace_total_loss"]:
        loss = total(model(batch))
        trace.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tolerance = case.case["tolerance"]
    assert trace == pytest.approx(case.case["optimizer_trace_total_loss"], rel=tolerance["trace_rel"])
    after = dict(model.named_parameters())
    deltas = {name: (after[name] - before[name]).norm().item() for name in case.case["optimizer_delta_norms"]}
    assert deltas == pytest.approx(case.case["optimizer_delta_norms"], rel=tolerance["delta_rel"])


def test_names_shapes_and_official_order(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model = build_golden_model(case)
    weights = case.tensors("weights.safetensors")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert official_param_order(model) == case.case["param_names_in_order"]


def test_position_table_is_resized_on_loading(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    table = build_golden_model(case, load=False).base_model.visual.positional_embedding
    assert torch.equal(table, case.tensors()["loaded_visual_positional_embedding"])


@pytest.mark.golden("cmlfa", kind="pos_embed")
def test_resize_pos_embed(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors = case.tensors()
    for number, item in enumerate(case.case["items"]):
        resized = resize_pos_embed(tensors[f"in{number}"], item["h"], item["w"])
        assert (resized - tensors[f"out{number}"]).abs().max() < case.case["tolerance"]["abs"]


@torch.no_grad()
@pytest.mark.golden("cmlfa", kind="safl")
def test_safl(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    module = SAFL(case.case["dim"], case.case["part_num"]).eval()
    module.load_state_dict(case.tensors("weights.safetensors"))
    tensors = case.tensors()
    assert (module(tensors["x"]) - tensors["y"]).abs().max() < case.case["tolerance"]["abs"]
