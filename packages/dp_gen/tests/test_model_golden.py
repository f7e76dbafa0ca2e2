"""Model and losses against the stored numbers of the released stack."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dp_gen import (
    DiversePersonController,
    DiversePersonModel,
    attribute_localization_loss,
    load_checkpoint,
    official_state_dict,
    set_trainable,
)
from dp_gen.model.parts import load_training_scheduler

pytestmark = pytest.mark.golden("dp_gen")


def official(case: Any) -> dict[str, torch.Tensor]:
    return load_file(case.folder.parent / "official.safetensors")


def build(case: Any, helpers: Any) -> DiversePersonModel:
    model = DiversePersonModel.from_pretrained(helpers.golden_args(case))
    load_checkpoint(model, official(case))
    return model


def for_cases(prefix: str) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        test.stored_prefix = prefix
        return test

    return mark


@for_cases("controller")
def test_controller(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = case.tensors(), case.case["tolerance"]
    controller = DiversePersonController(case.case["embedding_dim"])
    weights = official(case)
    controller.load_state_dict(
        {k.removeprefix("controller."): v for k, v in weights.items() if k.startswith("controller.")}
    )
    attribute = tensors["attr"].requires_grad_()
    before = tensors["text"].clone()
    out = controller(tensors["text"], attribute, tensors["mask"], tensors["num"])
    assert torch.equal(tensors["text"], before), "the text features are left as they are"
    helpers.assert_close(out, tensors["out"], tolerance, "out")
    (out * tensors["w"]).sum().backward()
    helpers.assert_close(attribute.grad, tensors["grad_attr"], tolerance, "grad_attr")
    for name, parameter in controller.named_parameters():
        helpers.assert_close(parameter.grad, tensors[f"grad.{name}"], tolerance, name)


@for_cases("encoders")
@torch.no_grad()
def test_encoders(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = helpers.decoded(case.tensors()), case.case["tolerance"]
    model = build(case, helpers)
    batch = {name.removeprefix("batch."): value for name, value in tensors.items() if name.startswith("batch.")}
    found = {
        "text_out": model.encode_text(tensors["input_ids"]),
        "image_out_R": model.encode_image(tensors["images_R"]),
        "image_out_native": model.encode_image(tensors["images_native"]),
        "cond": model.encode_condition(batch),
        "latents": model.encode_latents(batch["pix_v"], tensors["posterior_noise"]),
    }
    for name, value in found.items():
        helpers.assert_close(value, tensors[name], tolerance, name)


@for_cases("localization")
def test_localization_loss(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = helpers.decoded(case.tensors()), case.case["tolerance"]
    maps = {k.removeprefix("att."): v.requires_grad_() for k, v in tensors.items() if k.startswith("att.")}
    assert maps
    given = tensors["seg_maps"], tensors["token_idx"].long(), tensors["token_idx_mask"].bool(), case.case["norm"]
    loss = attribute_localization_loss(maps, *given)
    loss.backward()
    stored_loss = tensors.get("loss", case.case.get("loss"))
    helpers.assert_close(loss, torch.as_tensor(stored_loss).reshape(()), tolerance, "loss")
    per_layer = tensors.get("per_layer")
    for number, (name, probabilities) in enumerate(maps.items()):
        if per_layer is not None:
            alone = attribute_localization_loss({name: probabilities}, *given)
            helpers.assert_close(alone, per_layer[number], tolerance, name)
        if f"grad.{name}" in tensors:
            batch, slots = given[1].shape
            gradient = probabilities.grad.unflatten(0, (batch, -1))
            places = given[1][:, None, None].expand(batch, gradient.shape[1], gradient.shape[2], slots)
            helpers.assert_close(gradient.gather(3, places), tensors[f"grad.{name}"], tolerance, f"grad {name}")


@for_cases("train_")
def test_training_forward_and_gradients(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = helpers.decoded(case.tensors()), case.case["tolerance"]
    args = helpers.golden_args(case)
    model = build(case, helpers)
    set_trainable(model, args)
    assert (model.capture.names if model.capture else []) == case.case["captured_layers"]
    batch = {k.removeprefix("batch."): v for k, v in tensors.items() if k.startswith("batch.")}
    draws = {k.removeprefix("draw."): v for k, v in tensors.items() if k.startswith("draw.")}
    losses = model(batch, load_training_scheduler(args, **case.case["scheduler_overrides"]), draws)
    assert losses.keys() == case.case["losses"].keys()
    for name, loss in losses.items():
        wanted = case.case["losses"][name]
        assert abs(float(loss.detach()) - wanted) <= tolerance["atol"] + tolerance["rtol"] * abs(wanted), name
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    for name, wanted in case.case["grad_norms"].items():
        assert abs(float(parameters[name].grad.norm()) - wanted) <= tolerance["atol"] + tolerance["rtol"] * wanted, name
    total = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(case.case["total_grad_norm"], rel=tolerance["rtol"])
    for name, wanted in tensors.items():
        if name.startswith("grad."):
            helpers.assert_close(parameters[name.removeprefix("grad.")].grad, wanted, tolerance, name)


@for_cases("encoders")
def test_official_layout_both_ways(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    weights = official(case)
    written = official_state_dict(build(case, helpers))
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
