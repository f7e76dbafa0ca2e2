"""The model's behaviour beside its numbers: what is trained, what is stored, what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fafa import Blip2FAFACPR, load_model_and_preprocess
from fafa.checkpoint import official_named_parameters, official_state_dict
from fafa.model import place
from fafa.model.settings import BACKBONES, ModelSettings
from fafa.optim import build_optimizer, build_scheduler
from fafa.transforms import normalised
from tbps_common.errors import InputError

Tiny = Callable[..., Blip2FAFACPR]


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def test_a_frozen_vit_stores_no_gradient_and_stays_in_evaluation_mode(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().train()
    assert model.training and not model.visual_encoder.training
    assert not model.vit_states(batch["image"]).requires_grad
    assert model.image_states(batch["image"]).requires_grad  # ln_vision is trained
    total(model(batch)).backward()
    trained = {name for name, parameter in official_named_parameters(model) if parameter.grad is not None}
    everything = {name for name, _ in official_named_parameters(model)}
    untouched = {name.split(".")[0] + "." + name.split(".")[1] for name in everything - trained if "." in name}
    assert {name.split(".")[0] for name in untouched} == {"visual_encoder", "Qformer", "itm_head"}
    assert all(not name.startswith("visual_encoder.") for name in trained) and "ln_vision.weight" in trained


def test_one_pass_of_the_vit_serves_reference_and_target(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().train()
    seen: list[int] = []
    model.visual_encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model(batch)
    assert seen == [8]
    together = model.vit_states(torch.cat([batch["image"], batch["target"]]))
    apart = torch.cat([model.vit_states(batch["image"]), model.vit_states(batch["target"])])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


def test_folding_the_norm_into_keys_and_values_changes_neither_losses_nor_gradients(
    tiny: Tiny, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folded in (True, False):
        model = tiny(use_dsu=False).double().train()
        with torch.no_grad():  # where a mistake would show
            model.ln_vision.weight.copy_(torch.linspace(-1, 2, 24))
            model.ln_vision.bias.copy_(torch.linspace(1, -2, 24))
        if not folded:
            monkeypatch.setattr(type(model), "folded_norm", lambda self, states: (self.ln_vision(states), None))
        torch.manual_seed(0)
        losses = model({**batch, "image": batch["image"].double(), "target": batch["target"].double()})
        total(losses).backward()
        gradients = {name: p.grad for name, p in official_named_parameters(model) if p.grad is not None}
        found.append({**losses, **gradients})
    assert "ln_vision.bias" in found[0] and found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-9, rtol=1e-7)


def test_a_model_normalises_pixels_itself(tiny: Tiny) -> None:
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    model = tiny()
    assert torch.equal(model.vit_states(pixels), model.vit_states(normalised(pixels)))


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L"])
def test_recomputed_blocks_give_the_same_gradients(tiny: Tiny, batch: dict[str, Any], vit_model: str) -> None:
    grads = []
    depth = {"vit_depth": 15} if vit_model == "clip_L" else {}  # CLIP recomputes from its 14th block on
    for recompute in (False, True):
        model = tiny(vit_model=vit_model, freeze_vit=False, use_grad_checkpoint=recompute, use_dsu=False, **depth)
        assert model.train().visual_encoder.training
        torch.manual_seed(0)
        total(model(batch)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("visual_encoder" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_the_key_bias_of_a_trained_eva_tower_does_not_exist(tiny: Tiny) -> None:
    names = [name for name, _ in official_named_parameters(tiny(freeze_vit=False))]
    assert "visual_encoder.blocks.1.attn.q_bias" in names and "visual_encoder.blocks.1.attn.v_bias" in names
    assert sum("attn" in name and name.startswith("visual_encoder.blocks.0") for name in names) == 5


def test_stochastic_depth_acts_in_training_alone(tiny: Tiny, batch: dict[str, Any]) -> None:
    model, plain = tiny(freeze_vit=False, drop_path_rate=0.5), tiny(freeze_vit=False)
    image = batch["image"][:1].repeat(64, 1, 1, 1)
    plain_states = plain.eval().vit_states(image)
    torch.testing.assert_close(model.eval().vit_states(image), plain_states)
    torch.manual_seed(0)
    dropped = model.train().vit_states(image)
    # Two branches of the last block, each dropped or doubled: four outcomes for the same image.
    assert len(dropped.detach()[:, 0].mul(1e4).round().unique(dim=0)) == 4
    frozen = tiny(drop_path_rate=0.5).train()
    torch.testing.assert_close(frozen.vit_states(image), plain_states)


def test_evaluation_mode_gives_the_losses_without_noise(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(use_mmd=True, use_coral=True).eval()
    draws = {"mfr_mask_A": torch.ones(4, 32), "mfr_mask_B": torch.ones(4, 32)}
    first, second = model(batch, draws), model(batch, draws)
    assert list(first) == ["loss_fd", "loss_fda", "loss_mfr", "loss_mmd", "loss_coral"]
    for name, loss in first.items():
        assert torch.equal(loss, second[name]) and loss.shape == () and loss.isfinite()


def test_losses_that_are_off_are_absent(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(use_mlm=False, use_dispersion=False)
    assert list(model(batch)) == ["loss_fda"]
    assert not any(name.startswith("mlm_predictor") for name in official_state_dict(model))


def test_the_soft_label_strength_needs_its_switch(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(use_dsu=False).eval()
    before = model(batch)["loss_fda"]
    model.fda_alpha = 0.1
    assert torch.equal(model(batch)["loss_fda"], before)
    model.use_fda_alpha = True
    assert not torch.equal(model(batch)["loss_fda"], before)


def test_a_batch_of_one_trains(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().train()
    single = {name: value[:1] for name, value in batch.items()}
    losses = model(single)
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert model.query_tokens.grad is not None and model.query_tokens.grad.isfinite().all()


def test_captions_may_come_encoded(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(use_dsu=False).eval()
    encoded = model.tokenizer(
        batch["text_input"], padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    assert torch.equal(model(batch)["loss_fda"], model({**batch, "text_input": encoded})["loss_fda"])


def test_padding_does_not_change_a_query(tiny: Tiny, batch: dict[str, Any]) -> None:
    model, longer = tiny().eval(), tiny(max_txt_len=30).eval()
    longer.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        model.forward_query(batch["image"], batch["text_input"]),
        longer.forward_query(batch["image"], batch["text_input"]),
    )


def test_text_longer_than_the_position_table_is_cut(tiny: Tiny) -> None:
    model = tiny().eval()
    embeds = model.extract_features({"text_input": ["red " * 100]}, mode="text").text_embeds
    assert embeds is not None and embeds.shape[1] == 40
    with pytest.raises(ValueError, match="mode"):
        model.extract_features({"text_input": ["red"]}, mode="txt")


def test_features_from_states_are_the_features_of_the_images(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().eval()
    states = model.evaluation_states(batch["image"])
    features, embeds = model.extract_target_features(batch["image"])
    assert torch.equal(model.target_features(states), features) and features.shape == (4, 5, 16)
    assert torch.equal(model.ln_vision(states).float(), embeds)
    samples = {"image": batch["image"], "text_input": batch["text_input"]}
    query = model.extract_features(samples).multimodal_embeds
    assert query is not None and torch.equal(model.query_features(states, batch["text_input"]), query)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(4, 5))
    assert not features.requires_grad and not query.requires_grad


def test_more_counting_tokens_than_query_tokens_is_an_input_error(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(fda_k=6)
    with pytest.raises(ValueError, match=r"--fda-k 6.*5"):
        model(batch)
    features, embeds = model.extract_target_features(batch["image"])
    with pytest.raises(InputError, match=r"--fda-k 6.*5"):
        model.inference(embeds, features, batch["text_input"])
    model.use_soft = False
    model(batch)


def test_images_of_another_side_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="28"):
        tiny().vit_states(torch.zeros(2, 3, 56, 56))


@pytest.mark.parametrize("vit_model, kept", [("eva_clip_g", ()), ("clip_L", ("q_proj", "k_proj", "v_proj"))])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gpu_stores_the_frozen_vits_matrices_in_half(
    tiny: Tiny, vit_model: str, kept: tuple[str, ...], precision: str
) -> None:
    model = place(tiny(vit_model=vit_model, vit_precision=precision), "meta")  # any device but the CPU
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    for name, module in model.visual_encoder.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            assert module.weight.dtype == (torch.float32 if name.endswith(kept or "-") else half), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.dtype == torch.float32
    exported = official_state_dict(model)
    if vit_model == "eva_clip_g":
        assert exported["visual_encoder.blocks.0.attn.qkv.weight"].dtype == half
        assert exported["visual_encoder.blocks.0.attn.q_bias"].dtype == torch.float32
        assert exported["visual_encoder.pos_embed"].dtype == torch.float32
    else:
        assert exported["visual_encoder.conv1.weight"].dtype == half
        assert exported["visual_encoder.transformer.resblocks.0.attn.in_proj_weight"].dtype == torch.float32
    assert exported["Qformer.bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.float32


def test_a_trained_or_fp32_vit_stays_in_float32(tiny: Tiny) -> None:
    for changes in ({"vit_precision": "fp16", "freeze_vit": False}, {"vit_precision": "fp32"}):
        model = place(tiny(**changes), "meta")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_half_precision_vit_runs_under_its_own_autocast(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().eval()
    expected = model.vit_states(batch["image"])
    for module in model.visual_encoder.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.bfloat16()
    states = model.vit_states(batch["image"])
    assert states.dtype == torch.float32  # the residual stream
    torch.testing.assert_close(states, expected, atol=0.05, rtol=0.05)


def test_compiling_the_vit_keeps_names_and_numbers(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny().eval()
    names, expected = list(model.state_dict()), model.vit_states(batch["image"])
    model.compile_vit(backend="aot_eager")
    torch.testing.assert_close(model.vit_states(batch["image"]), expected)
    assert list(model.state_dict()) == names


def test_a_copy_trains_like_the_original(tiny: Tiny, batch: dict[str, Any]) -> None:
    model = tiny(use_dsu=False).eval()
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    first = model(batch)
    torch.manual_seed(0)
    assert all(torch.equal(first[name], loss) for name, loss in twin(batch).items())


@pytest.mark.parametrize("name, entries", [("pretrain", 861), ("pretrain_vitL", 631), ("coco", 861)])
def test_full_size_layout(name: str, entries: int, tmp_path: Path) -> None:
    """Counted on the meta device: no memory, no weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(30517))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    with torch.device("meta"):
        model = Blip2FAFACPR(ModelSettings.from_mapping({**BACKBONES[name], "tokenizer": str(tmp_path / "vocab.txt")}))
    state = official_state_dict(model)
    assert len(state) == entries
    vit = sum(tensor.numel() for key, tensor in state.items() if key.startswith("visual_encoder."))
    positions = 677 * 1408 - 257 * 1408 if name == "coco" else 0
    assert vit == (290_581_504 if name == "pretrain_vitL" else 985_894_528 + positions)
    twins = {"Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"}
    qformer = {k: v for k, v in state.items() if k.startswith("Qformer.") and k not in twins and v.dtype != torch.int64}
    if name != "pretrain_vitL":
        assert sum(tensor.numel() for tensor in qformer.values()) == 186_282_811
    assert state["Qformer.bert.embeddings.word_embeddings.weight"].shape == (30523, 768)
    assert state["mlm_predictor.predictor.0.weight"].shape == (512, 1536)


def test_load_model_and_preprocess_gives_the_triple(
    tmp_path: Path, tiny_mapping: Callable[..., dict[str, Any]]
) -> None:
    import yaml
    from PIL import Image

    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"model": tiny_mapping()}), encoding="utf-8")
    model, images, text = load_model_and_preprocess("blip2_fafa_cpr", str(file), is_eval=True)
    assert not model.training and model.num_query_token == 5
    assert text["eval"]("A Red, coat!") == "a red, coat" and set(images) == set(text) == {"train", "eval"}
    picture = Image.new("RGB", (60, 90), (200, 10, 10))
    for processor in images.values():
        assert processor(picture).shape == (3, 28, 28)
    model, _, _ = load_model_and_preprocess("blip2_fafa_cpr", str(file), overrides={"num_query_token": 7})
    assert model.training and model.num_query_token == 7
    with pytest.raises(InputError, match="blip2_cir_cat"):
        load_model_and_preprocess("blip2_cir_cat", str(file))


def test_an_old_transformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    monkeypatch.setattr("fafa.model.fafa.version", lambda name: "4.26.1")
    with pytest.raises(InputError, match=r"transformers 5\.17 or later, but 4\.26\.1 is installed"):
        tiny()


@pytest.mark.parametrize("found", ["5.17.0", "5.23.0.dev0", "6.0"])
def test_a_new_transformers_is_accepted(monkeypatch: pytest.MonkeyPatch, found: str, tiny: Tiny) -> None:
    monkeypatch.setattr("fafa.model.fafa.version", lambda name: found)
    tiny()


@pytest.mark.parametrize("steps, epochs", [(50, 1), (25, 2), (10, 5), (49, 1), (51, 1), (1, 1), (2, 1), (3, 2)])
def test_the_schedule_works_for_every_length(tiny: Tiny, steps: int, epochs: int) -> None:
    optimizer = build_optimizer(tiny(), 1e-3)
    scheduler = build_scheduler(optimizer, 1e-3, steps, epochs)
    rates = []
    for _ in range(steps * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert all(0 < rate <= 1e-3 + 1e-12 for rate in rates)
    if steps * epochs == 50:
        assert rates[0] == pytest.approx(1e-3, rel=0.05) or rates[0] == pytest.approx(4e-5)
        assert max(rates) == pytest.approx(1e-3, rel=0.01) and rates[-1] < 1e-5


def test_the_optimizer_holds_everything_trainable_once(tiny: Tiny) -> None:
    for vit_model in ("eva_clip_g", "clip_L"):
        for freeze in (True, False):
            model = tiny(vit_model=vit_model, freeze_vit=freeze)
            optimizer = build_optimizer(model, 1e-3)
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert len(optimizer.param_groups) == 1 and len(set(held)) == len(held)
            assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "content, named",
    [("a\nb\n", r"\[PAD\]"), ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nred\n", "red"), (None, "no-such-tokenizer")],
)
def test_a_vocabulary_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, named: str) -> None:
    from fafa.model.tokenizer import build_tokenizer

    file = tmp_path / "vocab.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=named):
        build_tokenizer(str(file) if content is not None else str(tmp_path / "no-such-tokenizer"))


def test_a_folder_with_a_vocabulary_is_a_tokenizer(vocabulary: Path) -> None:
    from fafa.model.tokenizer import build_tokenizer

    folder, file = build_tokenizer(str(vocabulary.parent)), build_tokenizer(str(vocabulary))
    assert folder("the man's red-ish bag")["input_ids"] == file("the man's red-ish bag")["input_ids"]
    assert folder.bos_token == "[DEC]" and len(folder) == len(file)


def test_a_step_under_autocast_with_a_half_precision_vit(tiny: Tiny, batch: dict[str, Any]) -> None:
    """What a GPU does, with bfloat16 on the CPU: half matrices, float32 residual streams, float32 losses."""
    model = tiny(vit_precision="bf16", use_mmd=True, use_coral=True).train()
    draws: dict[str, Any] = {"dsu_gate": 0.0, "dsu_eps_beta": torch.ones(5, 32), "dsu_eps_gamma": torch.ones(5, 32)}
    draws |= {"mfr_mask_A": torch.ones(4, 32), "mfr_mask_B": torch.ones(4, 32)}
    expected = model(batch, draws)
    model.store_vit_in_half()
    seen: list[torch.dtype] = []
    model.Qformer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch, draws)
        total(losses).backward()
    assert seen == [torch.float32, torch.float32]
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[name], atol=0.1, rtol=0.1)
    assert losses["loss_fd"].dtype == torch.float32
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    model.eval()
    features, embeds = model.extract_target_features(batch["image"])
    assert features.dtype == embeds.dtype == torch.float32
