"""Official checkpoints: names and shapes, resampled tables, lenient and strict loading, start weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mra import Retrieval, interpolate_relative_pos_embed
from tbps_common.errors import CheckpointError, InputError


def constants(name: str) -> bool:
    return name.rpartition(".")[2] in ("relative_position_index", "attn_mask", "position_ids")


@pytest.mark.golden("mra", kind="keys_full")
def test_names_and_shapes_at_released_size_on_the_meta_device(golden: Any, golden_name: str) -> None:
    for task, stored in golden(golden_name).case["tasks"].items():
        with torch.device("meta"):
            model = Retrieval(stored["config"], init_backbones=False)
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == stored["keys"], task
        assert sum(parameter.numel() for parameter in model.parameters()) == stored["n_params"]
        assert len(model.init_params) == stored["init_params_count"]


@pytest.mark.golden("mra", kind="ckpt_interp")
def test_resampled_tables_and_loading_at_another_size(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tables, tolerance = case.tensors("tables.safetensors"), case.case["tolerance"]
    for name in (name for name in tables if name.startswith("in_")):
        wanted = tables[name.replace("in_", "out_", 1)]
        found = interpolate_relative_pos_embed(tables[name], len(wanted))
        assert (found - wanted).abs().max() <= tolerance["tables"] * max(1.0, wanted.abs().max().item())
    source, expected = case.tensors("source.safetensors"), case.tensors("expected.safetensors")
    model = Retrieval(case.case["config"], init_backbones=False).eval()
    # The stored file lacks the constants; a real one holds those of its own size.
    source["vision_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    source["vision_encoder.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    assert model.load_pretrained({"model": source, "config": {}}, case.case["config"]) == ([], [])
    for name in (name for name in expected if name.startswith("table.")):
        assert (model.state_dict()[name.removeprefix("table.")] - expected[name]).abs().max() <= 2e-5
    image = (case.tensors("inputs.safetensors")["image_u8"].float() / 255 - 0.45) / 0.25
    with torch.no_grad():
        embeds, _ = model.get_vision_embeds(image)
        features = model.get_image_feat(embeds)
    assert (embeds - expected["image_embeds"]).abs().max() < tolerance["features"]
    assert (features - expected["image_feat"]).abs().max() < tolerance["features"]

    linear = Retrieval(case.case["config_rstp"], init_backbones=False)
    missing, unexpected = linear.load_pretrained(source, case.case["config_rstp"])
    assert sorted(missing) == sorted(case.case["missing_rstp"])
    assert sorted(unexpected) == sorted(case.case["unexpected_rstp"])


@pytest.mark.parametrize("side, target", [(13, 15), (13, 7), (5, 3), (9, 9), (7, 21)])
def test_resampling_keeps_what_a_spline_represents(side: int, target: int) -> None:
    """Constants stay constants, symmetric tables stay symmetric, the centre stays, and equal sizes are untouched."""
    table = torch.randn(side * side, 2, generator=torch.Generator().manual_seed(0))
    found = interpolate_relative_pos_embed(table, target * target)
    assert found.shape == (target * target, 2)
    if side == target:
        assert found is table
    square, original = found.view(target, target, 2), table.view(side, side, 2)
    torch.testing.assert_close(square[target // 2, target // 2], original[side // 2, side // 2])
    flat = interpolate_relative_pos_embed(torch.full((side * side, 1), 0.7), target * target)
    torch.testing.assert_close(flat, torch.full((target * target, 1), 0.7))
    mirrored = interpolate_relative_pos_embed(original.flip(1).reshape(side * side, 2), target * target)
    torch.testing.assert_close(mirrored.view(target, target, 2), square.flip(1))


@pytest.mark.parametrize("rows, target", [(12, 25), (16, 25), (9, 25), (25, 24)])
def test_tables_that_cannot_be_resampled(rows: int, target: int) -> None:
    with pytest.raises(CheckpointError):
        interpolate_relative_pos_embed(torch.zeros(rows, 1), target)


def test_pretraining_to_fine_tuning(model: Callable[..., Any], config: Callable[..., Any]) -> None:
    pretrained = model("sda").state_dict()
    fine = model("cuhk", seed=1)
    assert fine.load_pretrained(pretrained, {**config("cuhk"), "window_size": 2}) == ([], [])
    own = fine.state_dict()
    for name, tensor in pretrained.items():
        if not constants(name) and not name.endswith("bias_table"):
            assert torch.equal(own[name], tensor), name
    assert own["vision_encoder.layers.3.blocks.0.attn.relative_position_bias_table"].shape == (9, 4)

    linear = model("rstp", seed=1)
    before = linear.vision_proj.weight.clone()
    missing, unexpected = linear.load_pretrained(pretrained, {**config("rstp"), "window_size": 2})
    assert (len(missing), len(unexpected)) == (4, 14)
    assert torch.equal(linear.vision_proj.weight, before)
    linear = model("sda", embed_dim=256, seed=2)
    missing, unexpected = model("sda").load_pretrained(linear.state_dict(), config("sda"))
    assert (len(missing), len(unexpected)) == (14, 4)


def test_what_does_not_fit_is_refused_and_changes_nothing(
    model: Callable[..., Any], config: Callable[..., Any], tmp_path: Path
) -> None:
    net = model("cuhk")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    good = model("cuhk", seed=3).state_dict()
    lacking = {name: tensor for name, tensor in good.items() if name != "itm_head.0.weight"}
    strange = {**good, "visual.conv1.weight": torch.zeros(3)}
    misshapen = {**good, "itm_head.0.weight": torch.zeros(3, 3)}
    for state, word in ((lacking, "missing: itm_head.0.weight"), (strange, "unexpected: visual"), (misshapen, "shape")):
        with pytest.raises(ValueError, match=word):
            net.load_pretrained(state, config("cuhk"))
    # Evaluating with projections that the checkpoint does not hold would measure random numbers.
    other = model("rstp").state_dict()
    with pytest.raises(CheckpointError, match="vision_proj"):
        net.load_pretrained(other, config("cuhk"), is_eval=True)
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist"):
        net.load_pretrained(tmp_path / "absent.pth", config("cuhk"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    torch.save({"model": {f"module.{name}": tensor for name, tensor in good.items()}, "config": {}}, tmp_path / "a.pth")
    assert net.load_pretrained(tmp_path / "a.pth", config("cuhk"), is_eval=True) == ([], [])
    assert torch.equal(net.itm_head[0].weight, good["itm_head.0.weight"])


def test_state_dict_round_trip_without_position_ids_keeps_the_tie(model: Callable[..., Any]) -> None:
    state = model("cuhk").state_dict()
    assert state["text_encoder.bert.embeddings.position_ids"].tolist() == [list(range(64))]
    del state["text_encoder.bert.embeddings.position_ids"]
    for assign in (False, True):
        net = model("cuhk", seed=1)
        net.load_state_dict(state, strict=True, assign=assign)
        head, words = net.text_encoder.cls.predictions, net.text_encoder.embeddings.word_embeddings
        assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
        names = [name for name, _ in net.official_named_parameters()]
        assert len(names) == len(set(names)) and "text_encoder.cls.predictions.decoder.weight" not in names
    with torch.device("meta"):
        net = model("cuhk")
    net.to_empty(device="cpu").load_state_dict(state)
    assert net.text_encoder.cls.predictions.decoder.weight is net.text_encoder.embeddings.word_embeddings.weight


def test_start_weights(model: Callable[..., Any], config: Callable[..., Any], tmp_path: Path) -> None:
    """Swin from an official file, BERT as transformers saves it and with the oldest names; the rest stays random."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    teacher = model("sda").state_dict()
    swin = {
        name.removeprefix("vision_encoder."): t for name, t in teacher.items() if name.startswith("vision_encoder.")
    }
    torch.save(
        {"model": {**swin, "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}}, tmp_path / "swin.pth"
    )
    sizes = config("sda")["text_config"]
    bert_config = BertConfig(**{key: sizes[key] for key in sizes if key not in ("fusion_layer", "encoder_width")})
    settings = config("sda", load_params=True, text_encoder=str(tmp_path / "bert"))
    settings["vision_config"]["ckpt"] = str(tmp_path / "swin.pth")
    with pytest.raises(InputError, match="bert-base-uncased"):
        Retrieval(settings)
    bert = BertForMaskedLM(bert_config)
    bert.save_pretrained(tmp_path / "bert")
    net = Retrieval(settings)
    assert torch.equal(net.vision_encoder.patch_embed.proj.weight, swin["patch_embed.proj.weight"])
    reference = bert.state_dict()
    own = net.text_encoder.state_dict()
    assert all(torch.equal(own[name], reference[name]) for name in own if name in reference)
    assert sum(".crossattention." in name for name in own if name not in reference) == 60
    assert {name for name in own if name not in reference} == {
        *(name for name in own if ".crossattention." in name),
        "bert.embeddings.position_ids",
    }
    assert len(net.init_params) == 60 and all(".crossattention." in name for name in net.init_params)

    oldest = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in BertForPreTraining(bert_config).state_dict().items()
        if not name.startswith("cls.predictions.decoder.")
    }
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save(oldest, tmp_path / "bert" / "pytorch_model.bin")
    net = Retrieval(settings)
    layer_norm = net.text_encoder.embeddings.LayerNorm
    assert torch.equal(layer_norm.weight, oldest["bert.embeddings.LayerNorm.gamma"])
    (tmp_path / "bert" / "pytorch_model.bin").unlink()
    del oldest["bert.embeddings.LayerNorm.gamma"]
    save_file({name: tensor.contiguous() for name, tensor in oldest.items()}, tmp_path / "bert" / "model.safetensors")
    with pytest.raises(CheckpointError, match="LayerNorm.weight"):
        Retrieval(settings)
    settings["vision_config"]["ckpt"] = str(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match=r"gone\.pth do not exist: download"):
        Retrieval(settings)
