"""Parity with stored outputs of the released code; a new case of a kind is picked up by its name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fafa import Blip2FAFACPR
from fafa.checkpoint import (
    interpolate_pos_embed,
    load_official_state_dict,
    official_named_parameters,
    official_state_dict,
)
from fafa.optim import build_optimizer, build_scheduler
from fafa.processors import BlipCaptionProcessor


def build(golden_case: Any, config: str = "config") -> Blip2FAFACPR:
    mapping = dict(golden_case.case[config])
    mapping["tokenizer"] = str(golden_case.folder / mapping["tokenizer"])
    return Blip2FAFACPR.from_config(mapping)


def load(golden_case: Any) -> Blip2FAFACPR:
    model = build(golden_case)
    load_official_state_dict(model, golden_case.tensors(golden_case.case["weights"]), strict=True)
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: dict[str, Any]) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance["atol"], rtol=tolerance.get("rtol", 0))


@pytest.mark.golden("fafa", prefix="model_")
def test_every_feature_path(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    case, tensors, tolerance = stored.case, stored.tensors(), stored.case["tolerance"]
    model = load(stored).eval()
    clean = BlipCaptionProcessor()
    captions = [clean(caption) for caption in case["captions_raw"]]
    assert captions == case["captions"]
    image = tensors["image"]
    features, embeds = model.extract_target_features(image)
    tokens = model.tokenize(captions)
    text = model.extract_features({"text_input": captions}, mode="text")
    pictures = model.extract_features({"image": image}, mode="image")
    model.fda_k = case["fda_k_for_inference"]
    with torch.no_grad():
        actual = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_features": features,
            "image_embeds_frozen": embeds,
            "multimodal_embeds": model.extract_features({"image": image, "text_input": captions}).multimodal_embeds,
            "image_embeds": pictures.image_embeds,
            "image_embeds_proj": pictures.image_embeds_proj,
            "text_embeds": text.text_embeds,
            "text_embeds_proj": text.text_embeds_proj,
            "forward_query": model.forward_query(image, captions),
            "forward_text": model.forward_text(tokens),
            "itm": model.compute_itm(embeds, tokens["input_ids"], tokens["attention_mask"]),
            "inference_sim": model.inference(embeds, features, captions),
        }
    for name, value in actual.items():
        close(value, tensors[f"expected.{name}"], tolerance)
    hidden, again = model.forward_image(image)
    close(hidden.detach(), tensors["expected.image_embeds"], tolerance)
    close(again.detach(), tensors["expected.image_embeds_frozen"], tolerance)


def prepared(stored: Any) -> tuple[Blip2FAFACPR, dict[str, Any]]:
    case, tensors = stored.case, stored.tensors()
    model = load(stored).train()
    model.fda_k = case["fda_k"]
    model.dispersion_loss.margin = case["fd_margin"]
    for name, value in case["model_flags"].items():
        setattr(model, name, value)
    samples = {name: tensors[name] for name in ("image", "target", "query_id")}
    return model, {**samples, "text_input": case["captions"]}


@pytest.mark.golden("fafa", prefix="train_")
def test_losses_and_gradients_of_a_training_step(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    case, tensors, tolerance = stored.case, stored.tensors(), stored.case["tolerance"]
    model, samples = prepared(stored)
    draws: dict[str, Any] = {
        name.removeprefix("draws."): value for name, value in tensors.items() if name.startswith("draws.")
    }
    losses = model(samples, draws={**draws, "dsu_gate": case["dsu_gate"]})
    total = torch.stack([case["loss_weights"].get(name, 1.0) * loss for name, loss in losses.items()]).sum()
    total.backward()
    assert set(losses) == {name.removeprefix("expected.") for name in tensors if name.startswith("expected.loss_")}
    for name, loss in losses.items():
        close(loss.detach(), tensors[f"expected.{name}"], tolerance)
    close(total.detach(), tensors["expected.total"], tolerance)
    parameters = dict(official_named_parameters(model))
    for name, expected in tensors.items():
        if name.startswith("expected.grad."):
            grad = parameters[name.removeprefix("expected.grad.")].grad
            assert grad is not None and (grad - expected).norm() <= tolerance["grad_rtol"] * expected.norm()
    one_to_one = {name: norm for name, norm in case["grad_norms"].items() if name in parameters}
    assert len(one_to_one) > 50
    for name, norm in one_to_one.items():
        grad = parameters[name].grad
        if not norm:  # never touched: the language-model head, the matching head
            assert grad is None, name
            continue
        # Gradients of key biases are zero but for rounding.
        assert grad is not None and abs(grad.norm().item() - norm) <= tolerance["grad_rtol"] * norm + 1e-5, name


@pytest.mark.golden("fafa", prefix="train_")
def test_seeds_alone_reproduce_the_draws(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    model, samples = prepared(stored)
    torch.manual_seed(stored.case["seed_numpy_and_torch"])
    np.random.seed(stored.case["seed_numpy_and_torch"])
    for name, loss in model(samples).items():
        close(loss.detach(), stored.tensors()[f"expected.{name}"], stored.case["tolerance"])


@pytest.mark.golden("fafa", prefix="trajectory")
@pytest.mark.parametrize("drawn", ["given", "seeded"])
def test_a_short_training(golden: Callable[..., Any], case_name: str, drawn: str) -> None:
    stored = golden(case_name)
    case, tensors, tolerance = stored.case, stored.tensors(), stored.case["tolerance"]
    model = load(stored).train()
    model.fda_k = case["fda_k"]
    optimizer = build_optimizer(model, case["learning_rate"])
    scheduler = build_scheduler(optimizer, case["learning_rate"], case["steps"], 1)
    torch.manual_seed(case["seed_numpy_and_torch_before_step0"])
    np.random.seed(case["seed_numpy_and_torch_before_step0"])
    for step, expected in enumerate(case["losses"]):
        samples = {name: tensors[f"{step}.{name}"] for name in ("image", "target", "query_id")}
        prefix = f"{step}.draws."
        draws: dict[str, Any] = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        draws["dsu_gate"] = case["dsu_gate"][step]
        optimizer.zero_grad()
        losses = model({**samples, "text_input": case["captions"][step]}, draws=draws if drawn == "given" else None)
        total = losses["loss_fda"] + losses["loss_fd"] + 0.5 * losses["loss_mfr"]
        total.backward()
        optimizer.step()
        scheduler.step()
        for name, value in {**losses, "total": total}.items():
            assert value.item() == pytest.approx(expected[name], rel=tolerance["loss_rtol"]), (step, name)
    model.eval()
    features, _ = model.extract_target_features(tensors["probe.image"])
    probe = {"image": tensors["probe.image"], "text_input": case["probe_captions"]}
    query = model.extract_features(probe).multimodal_embeds
    assert query is not None
    close(features, tensors["expected.probe_features"], tolerance)
    close(query, tensors["expected.probe_query"], tolerance)
    close(model.temp.detach(), tensors["expected.temp"], tolerance)


@pytest.mark.golden("fafa", prefix="optim")
def test_optimizer_and_schedule(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    case, tensors, tolerance = stored.case, stored.tensors(), stored.case["tolerance"]
    mapping = dict(golden("model_eva").case["config"], tokenizer=str(golden("model_eva").folder / "vocab.txt"))
    model = Blip2FAFACPR.from_config(mapping)
    load_official_state_dict(model, stored.tensors(case["weights"]), strict=True)
    parameters = dict(official_named_parameters(model))
    assert [name for name, parameter in parameters.items() if parameter.requires_grad] == case["trainable"]
    optimizer = build_optimizer(model, case["learning_rate"])
    scheduler = build_scheduler(optimizer, case["learning_rate"], case["steps_per_epoch"], case["epochs"])
    assert len(optimizer.param_groups) == case["n_groups"]
    group = optimizer.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(parameters[name]) for name in case["trainable"]]
    assert (group["weight_decay"], group["betas"][1], group["eps"]) == (
        case["weight_decay"],
        case["beta2"],
        case["eps"],
    )
    rates, betas = [], []
    for step in range(len(tensors["expected.lr"])):
        rates.append(group["lr"])
        betas.append(group["betas"][0])
        optimizer.zero_grad()
        if step < case["n_steps"]:
            for name in case["tracked"]:
                parameters[name].grad = tensors[f"grads.{name}"][step].clone()
        optimizer.step()
        scheduler.step()
        if step + 1 == case["n_steps"]:
            for name in case["tracked"]:
                close(parameters[name].detach(), tensors[f"expected.after.{name}"], tolerance)
            for name, parameter in parameters.items():
                assert name in case["tracked"] or parameter.grad is None
    np.testing.assert_allclose(rates, tensors["expected.lr"].numpy(), rtol=tolerance["lr_rtol"])
    np.testing.assert_allclose(betas, tensors["expected.beta1"].numpy(), rtol=tolerance["lr_rtol"])


@pytest.mark.golden("fafa", prefix="checkpoint")
def test_layout_and_loading_rules(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    case, tensors = stored.case, stored.tensors()
    model = build(stored, "eva_config")
    exported = official_state_dict(model)
    assert {name: list(tensor.shape) for name, tensor in exported.items()} == case["official_keys"]
    # Values compare equal whatever their order; the order of the file is part of the layout too.
    assert list(exported) == list(case["official_keys"])
    clip = official_state_dict(build(stored, "clip_config"))
    assert {name: list(tensor.shape) for name, tensor in clip.items()} == case["official_keys_clip"]
    assert list(clip) == list(case["official_keys_clip"])

    full = stored.tensors(case["full"])
    result = load_official_state_dict(model, full, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in official_state_dict(model).items():
        torch.testing.assert_close(tensor, full[name], rtol=0, atol=0)

    partial = stored.tensors("partial.safetensors")
    result = load_official_state_dict(build(stored, "eva_config"), partial)
    assert sorted(result.missing_keys) == sorted(case["partial_missing"])
    assert sorted(result.unexpected_keys) == sorted(case["partial_unexpected"])
    with pytest.raises(RuntimeError, match="mlm_predictor"):
        load_official_state_dict(build(stored, "eva_config"), partial, strict=True)

    for kind, key in (("eva", "pos_embed"), ("clip", "positional_embedding")):
        resized = interpolate_pos_embed(tensors[f"{kind}.{key}"], case["grid_new"], kind)
        close(resized, tensors[f"{kind}.expected.{key}"], case["tolerance"])
    for kind, key, config in (("eva", "pos_embed", "eva_config"), ("clip", "positional_embedding", "clip_config")):
        model = build(stored, config)
        load_official_state_dict(model, {f"visual_encoder.{key}": tensors[f"{kind}.{key}"]})
        loaded = official_state_dict(model)[f"visual_encoder.{key}"]
        close(loaded, tensors[f"{kind}.expected.{key}"], case["tolerance"])


@pytest.mark.golden("fafa", prefix="text")
def test_cleaning_and_token_ids(golden: Callable[..., Any], case_name: str) -> None:
    from fafa.model.tokenizer import build_tokenizer

    stored = golden(case_name)
    case, tensors = stored.case, stored.tensors()
    clean, prompted = BlipCaptionProcessor(), BlipCaptionProcessor(prompt="a photo of ", max_words=4)
    assert [clean(caption) for caption in case["raw"]] == case["cleaned"]
    assert [prompted(caption) for caption in case["raw"]] == case["cleaned_prompt_a_photo_of_max4"]
    tokenizer = build_tokenizer(str(stored.folder / "vocab.txt"))
    assert len(tokenizer) == case["vocab_len_with_DEC"]
    assert tokenizer.convert_tokens_to_ids("[DEC]") == case["dec_id"]
    encoded = tokenizer(
        case["cleaned"], padding="max_length", truncation=True, max_length=case["max_length"], return_tensors="pt"
    )
    assert torch.equal(encoded["input_ids"], tensors["expected.input_ids"])
    assert torch.equal(encoded["attention_mask"], tensors["expected.attention_mask"])
