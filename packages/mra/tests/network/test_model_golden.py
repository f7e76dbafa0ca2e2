"""Parity of the network, its losses and four training steps with the stored reference numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mra import Retrieval, create_optimizer, lr_multiplier

pytestmark = pytest.mark.golden("mra", kind="model")

LOSSES = ("loss_itc", "loss_itm", "loss_mlm", "loss_region")


def pixels(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["image_u8"].float() / 255 - 0.45) / 0.25


def load(case: Any) -> Retrieval:
    model = Retrieval(case.case["config"], init_backbones=False)
    model.load_state_dict(case.tensors("weights.safetensors"), strict=True)
    return model


def arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"image": pixels(inputs), **{name: value for name, value in inputs.items() if name != "image_u8"}}


def total(losses: tuple[Tensor, ...], config: dict[str, Any]) -> Tensor:
    return losses[0] + losses[1] + losses[2] + config["region"] * losses[3]


@torch.no_grad()
def test_state_dict_and_evaluation(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    model, expected, inputs = (
        load(case).eval(),
        case.tensors("expected.safetensors"),
        case.tensors("inputs.safetensors"),
    )
    weights = case.tensors("weights.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()
    }
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    image_embeds, image_atts = model.get_vision_embeds(pixels(inputs))
    text_embeds = model.get_text_embeds(inputs["text_ids"], inputs["text_atts"])
    cross_embeds = model.get_cross_embeds(image_embeds, image_atts, text_embeds, inputs["text_atts"])
    image_feat, text_feat = model.get_image_feat(image_embeds), model.get_text_feat(text_embeds)
    mlm = (inputs["text_ids_masked"], inputs["text_atts"], image_embeds, image_atts)
    found = {
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "cross_embeds": cross_embeds,
        "image_feat": image_feat,
        "text_feat": text_feat,
        "itm_logits": model.itm_head(cross_embeds[:, 0]),
        "loss_itc_eval": model.get_contrastive_loss(image_feat, text_feat, inputs["idx"]),
        "loss_mlm_eval": model.get_mlm_loss(*mlm, inputs["masked_pos"], inputs["masked_ids"]),
    }
    # Seen from inside the box only, where there is a box.
    visible = 1 - inputs["box_atts"] if "box_atts" in inputs else image_atts
    found["cross_embeds_masked"] = model.get_cross_embeds(image_embeds, visible, text_embeds, inputs["text_atts"])
    tolerance = case.case["tolerance"]
    for name, value in found.items():
        allowed = tolerance["losses" if name.startswith("loss") else "features"]
        torch.testing.assert_close(
            value, expected[name], rtol=allowed, atol=allowed, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_losses_gradients_and_statistics_of_one_step(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    model, expected, inputs = (
        load(case).train(),
        case.tensors("expected.safetensors"),
        case.tensors("inputs.safetensors"),
    )
    tolerance, config = case.case["tolerance"], case.case["config"]
    negatives = {
        name: (expected[f"neg_image_{name}"], expected[f"neg_text_{name}"]) for name in case.case["negative_keys"]
    }
    losses = model(**arguments(inputs), negatives=negatives)
    for name, value in zip((*LOSSES, "loss_total"), (*losses, total(losses, config))):
        torch.testing.assert_close(value, expected[name], rtol=tolerance["losses"], atol=tolerance["losses"])
    total(losses, config).backward()
    gradients = {name: parameter.grad for name, parameter in model.official_named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == case.case["params_without_grad"]
    norms = case.case["gradient_norms"]
    assert set(norms) == set(gradients)
    # Gradients of key biases are zero but for rounding (a softmax does not see a constant): compared absolutely.
    scale = max(norms.values())
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=tolerance["grad_rel"], abs=1e-6 * scale), name
    for name in (name for name in expected if name.startswith("grad.")):
        reference = expected[name]
        difference = (gradients[name.removeprefix("grad.")] - reference).abs().max()
        assert difference <= tolerance["grad_rel"] * reference.abs().max() + 1e-7 * scale, name
    for name in (name for name in expected if name.startswith("after.")):
        torch.testing.assert_close(
            model.state_dict()[name.removeprefix("after.")].double(), expected[name].double(), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_sampling_weights(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    # The features that the draws were made from are those of training mode.
    model, expected, inputs = (
        load(case).train(),
        case.tensors("expected.safetensors"),
        case.tensors("inputs.safetensors"),
    )
    image_embeds, _ = model.get_vision_embeds(pixels(inputs))
    texts = {"main": "", "region": "_box", "eda": "_eda"}
    for name in case.case["negative_keys"]:
        suffix = texts[name]
        text_embeds = model.get_text_embeds(inputs[f"text_ids{suffix}"], inputs[f"text_atts{suffix}"])
        ids = inputs["label" if name == "region" else "idx"]
        seen = image_embeds
        if name == "region":  # the mean of the tokens inside the box comes first
            inside = (1 - inputs["box_atts"]).float().unsqueeze(2)
            mean = (inside * image_embeds).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True)
            seen = torch.cat([mean, image_embeds[:, 1:]], dim=1)
        weights = model.itm_negative_weights(model.get_image_feat(seen), model.get_text_feat(text_embeds), ids)
        for direction, value in zip(("w_i2t", "w_t2i"), weights):
            torch.testing.assert_close(value, expected[f"{direction}_{name}"], rtol=2e-4, atol=2e-4)


def test_four_optimizer_steps(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    model, expected, inputs = (
        load(case).train(),
        case.tensors("expected.safetensors"),
        case.tensors("inputs.safetensors"),
    )
    config, schedule, allowed = case.case["config"], case.case["schedule"], case.case["tolerance"]["train"]
    optimizer = create_optimizer(model, case.case["optimizer"])
    steps, warmup = schedule["num_training_steps"], schedule["num_warmup_steps"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_multiplier(schedule["sched"], step, steps, warmup)
    )
    rows = []
    for step, drawn in enumerate(expected["train_negatives"]):
        negatives = {name: (pair[0], pair[1]) for name, pair in zip(case.case["negative_keys"], drawn)}
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected["train_lr_group0"][step].item(), rel=1e-5)
        losses = model(**arguments(inputs), negatives=negatives)
        rows.append(torch.stack([*losses, total(losses, config)]).detach())
        optimizer.zero_grad()
        total(losses, config).backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(torch.stack(rows), expected["train_losses"], rtol=allowed, atol=allowed)
    for name in (name for name in expected if name.startswith("trained.")):
        value = model.state_dict()[name.removeprefix("trained.")]
        torch.testing.assert_close(value, expected[name], rtol=allowed, atol=allowed)
