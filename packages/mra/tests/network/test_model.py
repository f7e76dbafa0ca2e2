"""The network against the libraries' own classes and against the direct form of its losses; properties of its parts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mra.model.heads import thirds, thirds_inside
from mra.model.settings import ModelSettings, VisionSettings
from tbps_common.errors import InputError


@torch.no_grad()
def test_text_layers_are_those_of_transformers(model: Callable[..., Any], batch: Callable[..., Any]) -> None:
    from transformers import BertConfig, BertModel

    net = model("cuhk")
    sizes = {"vocab_size": 114, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**sizes, num_hidden_layers=6, max_position_embeddings=64)
    bert = BertModel(config, add_pooling_layer=False).eval()
    state = {name.removeprefix("bert."): tensor for name, tensor in net.text_encoder.state_dict().items()}
    bert.load_state_dict({name: state[name] for name in bert.state_dict()})
    inputs = batch(net)
    reference = bert(input_ids=inputs["text_ids"], attention_mask=inputs["text_atts"]).last_hidden_state
    found = net.get_text_embeds(inputs["text_ids"], inputs["text_atts"])
    words = inputs["text_atts"].bool()
    torch.testing.assert_close(found[words], reference[words], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fusion_layers_are_those_of_transformers(model: Callable[..., Any], batch: Callable[..., Any]) -> None:
    """A decoder of transformers with cross-attention, its causal mask lifted, its keys and values as wide as the image."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    net = model("cuhk")
    config = BertConfig(
        hidden_size=24, num_attention_heads=4, intermediate_size=48, is_decoder=True, add_cross_attention=True
    )
    config._attn_implementation = "eager"
    inputs = batch(net)
    image_embeds, image_atts = net.get_vision_embeds(inputs["image"])
    hidden = text = net.get_text_embeds(inputs["text_ids"], inputs["text_atts"])
    mask = (1.0 - inputs["text_atts"][:, None, None].float()) * -10000.0
    for number, own in enumerate(net.text_encoder.fusion_layers):
        layer = BertLayer(config, layer_idx=number).eval()
        layer.attention.self.is_causal = False
        for name in ("key", "value"):
            setattr(layer.crossattention.self, name, torch.nn.Linear(32, 24))
        layer.load_state_dict(own.state_dict())
        hidden = layer(hidden, mask, image_embeds)
    found = net.get_cross_embeds(image_embeds, image_atts, text, inputs["text_atts"])
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vision_encoder_is_timms_with_the_mean_in_front(model: Callable[..., Any]) -> None:
    from timm.models.swin_transformer import SwinTransformer

    net = model("cuhk")
    swin = SwinTransformer(
        img_size=(192, 128), window_size=2, embed_dim=4, num_heads=(1, 1, 2, 4), depths=(2, 2, 2, 2), num_classes=0,
        global_pool="", drop_path_rate=0.0,
    ).eval()  # fmt: skip
    own = net.vision_encoder.state_dict()
    state = {}
    for name in swin.state_dict():
        stage, found = name.split(".")[1:2], name
        if ".downsample." in name:  # timm merges at the beginning of a stage
            found = name.replace(f"layers.{stage[0]}.", f"layers.{int(stage[0]) - 1}.")
        state[name] = own[found]
    swin.load_state_dict(state)
    image = torch.randn(2, 3, 192, 128)
    reference = swin(image).flatten(1, 2)
    tokens, atts = net.get_vision_embeds(image)
    assert tokens.shape == (2, 25, 32) and atts.shape == (2, 25) and atts.dtype == torch.int64 and bool(atts.all())
    assert torch.equal(tokens[:, 1:], reference)
    torch.testing.assert_close(tokens[:, 0], reference.mean(dim=1))


def test_windows_and_shifts_follow_the_official_rule() -> None:
    def windows(height: int, width: int, window: int) -> list[tuple[int, int]]:
        sizes = {"h": height, "w": width, "window_size": window, "embed_dim": 8, "vision_width": 64}
        return VisionSettings.from_config({**sizes, "depths": [2, 2, 6, 2], "num_heads": [1, 1, 1, 1]}).windows

    assert windows(224, 224, 7) == [(7, 3), (7, 3), (7, 3), (7, 0)]
    assert windows(384, 256, 8) == [(8, 4), (8, 4), (8, 4), (4, 2)]
    # Where one direction fits the window there is no shift in either, unlike in timm.
    assert windows(64, 128, 2) == [(2, 1), (2, 1), (2, 1), (2, 0)]


def test_a_stage_narrower_than_its_window_is_not_shifted_and_stores_no_mask(model: Callable[..., Any]) -> None:
    net = model("rstp")  # 2 x 4 final tokens, window 2
    state = net.state_dict()
    assert "vision_encoder.layers.2.blocks.1.attn_mask" in state
    assert "vision_encoder.layers.3.blocks.1.attn_mask" not in state
    image = torch.randn(1, 3, 64, 128)
    blocks = net.vision_encoder.layers[3].blocks
    tokens = torch.randn(1, 2, 4, 32)
    with torch.no_grad():
        left = blocks[1](tokens[:, :, :2].repeat(1, 1, 2, 1))
        # Two windows with the same content stay the same: nothing was shifted between them.
        assert torch.equal(left[:, :, :2], left[:, :, 2:])
        assert net.get_vision_embeds(image)[0].shape == (1, 9, 32)


@pytest.mark.parametrize("count", [3, 7, 11, 49, 55, 96])
def test_thirds_are_adaptive_average_pooling(count: int) -> None:
    tokens = torch.randn(2, count, 5)
    reference = F.adaptive_avg_pool1d(tokens.transpose(1, 2), 3).transpose(1, 2).flatten(1)
    torch.testing.assert_close(thirds(tokens), reference)
    torch.testing.assert_close(thirds_inside(tokens, torch.ones(2, count, dtype=torch.long)), reference)


def test_thirds_inside_pool_the_chosen_tokens_in_their_order() -> None:
    tokens = torch.randn(3, 10, 4)
    inside = torch.zeros(3, 10, dtype=torch.long)
    inside[0, [1, 4, 5, 9]] = inside[1, 7] = inside[2, [0, 9]] = 1
    found = thirds_inside(tokens, inside)
    for row in range(3):
        chosen = tokens[row][inside[row].bool()]
        reference = F.adaptive_avg_pool1d(chosen.t()[None], 3)[0].t().flatten()
        torch.testing.assert_close(found[row], reference)


def direct_losses(net: Any, inputs: dict[str, Tensor], negatives: dict[str, Any]) -> tuple[Tensor, ...]:
    """The losses put together from the public parts, one branch and one pair of calls after the other."""
    image_embeds, image_atts = net.get_vision_embeds(inputs["image"])
    itc, itm, region = {}, {}, torch.zeros(())

    def branch(name: str, suffix: str, embeds: Tensor, atts: Tensor, ids: Tensor) -> None:
        text_atts = inputs[f"text_atts{suffix}"]
        text = net.get_text_embeds(inputs[f"text_ids{suffix}"], text_atts)
        image_feat, text_feat = net.get_image_feat(embeds), net.get_text_feat(text)
        itc[name] = net.get_contrastive_loss(image_feat, text_feat, ids)
        image_neg, text_neg = negatives[name]
        logits = [
            net.itm_head(net.get_cross_embeds(embeds[i], atts[i], text[t], text_atts[t])[:, 0])
            for i, t in ((slice(None), slice(None)), (image_neg, slice(None)), (slice(None), text_neg))
        ]
        labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
        itm[name] = F.cross_entropy(torch.cat(logits), labels)

    if "box_atts" in inputs:
        inside = 1 - inputs["box_atts"]
        mean = torch.stack([tokens[mask.bool()].mean(0) for tokens, mask in zip(image_embeds, inside)])
        joined = torch.cat([mean[:, None], image_embeds[:, 1:]], dim=1)
        branch("region", "_box", joined, inside, inputs["label"])
        region = 0.8 * (itc["region"] + itm["region"])
    branch("main", "", image_embeds, image_atts, inputs["idx"])
    if "text_ids_eda" in inputs:
        branch("eda", "_eda", image_embeds, image_atts, inputs["idx"])
        itc["main"], itm["main"] = itc["main"] + 0.8 * itc["eda"], itm["main"] + 0.8 * itm["eda"]
    masked = net.get_text_embeds(inputs["text_ids_masked"], inputs["text_atts"])
    fused = net.get_cross_embeds(image_embeds, image_atts, masked, inputs["text_atts"])
    logits = net.text_encoder.cls(fused)
    picked = torch.stack([row[places] for row, places in zip(logits, inputs["masked_pos"])])
    mlm = F.cross_entropy(picked.flatten(0, 1), inputs["masked_ids"].flatten(), ignore_index=-100)
    return itc["main"], itm["main"], mlm, region


@pytest.mark.parametrize("task", ["sda", "cuhk", "rstp"])
def test_forward_is_the_direct_form_in_values_and_gradients(
    model: Callable[..., Any], batch: Callable[..., Any], task: str
) -> None:
    ours = model(task).train()
    direct = copy.deepcopy(ours)
    inputs = batch(ours)
    branches = ["region", "main"] if task == "sda" else ["main", "eda"]
    negatives = {name: (torch.tensor([1, 2, 1, 1]), torch.tensor([3, 0, 0, 2])) for name in branches}
    found, reference = ours(**inputs, negatives=negatives), direct_losses(direct, inputs, negatives)
    for name, value, wanted in zip(("itc", "itm", "mlm", "region"), found, reference):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, msg=name)
    torch.stack(found).sum().backward()
    torch.stack(reference).sum().backward()
    parameters = dict(direct.official_named_parameters())
    for name, parameter in ours.official_named_parameters():
        torch.testing.assert_close(
            parameter.grad, parameters[name].grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    if task == "sda":  # the statistics saw the box's features, then the image's
        assert ours.vision_proj[0].num_batches_tracked == 2
        torch.testing.assert_close(ours.text_proj[0].running_mean, direct.text_proj[0].running_mean)


def test_gradient_checkpointing_changes_nothing(model: Callable[..., Any], batch: Callable[..., Any]) -> None:
    plain = model("sda").train()
    recomputing = copy.deepcopy(plain)
    recomputing.set_gradient_checkpointing(True)
    inputs = batch(plain)
    negatives = {name: (torch.tensor([1, 2, 1, 1]), torch.tensor([3, 0, 0, 2])) for name in ("main", "region")}
    for net in (plain, recomputing):
        torch.stack(net(**inputs, negatives=negatives)).sum().backward()
    other = dict(recomputing.official_named_parameters())
    assert all(torch.equal(p.grad, other[name].grad) for name, p in plain.official_named_parameters())


@pytest.mark.parametrize("task", ["sda", "rstp"])
def test_region_features_as_in_the_paper_see_the_box_only(
    model: Callable[..., Any], batch: Callable[..., Any], config: Callable[..., Any], task: str
) -> None:
    changes: dict[str, Any] = {"region": 0.8, "region_feat": "paper", "eda": False}
    net = model(task, **changes)
    inputs = batch(net)
    embeds, _ = net.get_vision_embeds(inputs["image"])
    outside = inputs["box_atts"].bool()
    outside[:, 0] = True
    other = torch.where(outside[..., None], torch.randn_like(embeds), embeds)
    results = []
    for tokens in (embeds, other):
        feature, keys, atts = net.region_features(tokens, net.text_encoder.image_keys(tokens), inputs["box_atts"])
        text = net.get_text_embeds(inputs["text_ids"], inputs["text_atts"])
        visible = (1.0 - atts[:, None, None].float()) * -1e9
        results.append((feature, net.text_encoder.fuse(text, None, keys, visible)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    # The loss carries the weight of the configuration only.
    negatives = {name: (torch.tensor([1, 2, 1, 1]), torch.tensor([3, 0, 0, 2])) for name in ("main", "region")}
    region = net(**inputs, negatives=negatives)[3]
    feature, keys, atts = net.region_features(embeds, net.text_encoder.image_keys(embeds), inputs["box_atts"])
    text = net.get_text_embeds(inputs["text_ids_box"], inputs["text_atts_box"])
    itc = net.get_contrastive_loss(feature, net.get_text_feat(text), inputs["label"])
    itm = net.pair_matching_loss(keys, atts, text, inputs["text_atts_box"], negatives["region"])
    torch.testing.assert_close(region, itc + itm)


def test_start_of_a_model(model: Callable[..., Any], config: Callable[..., Any], tmp_path: Path) -> None:
    from mra import Retrieval

    settings = config("cuhk")
    (tmp_path / "vision.json").write_text(json.dumps(settings["vision_config"]), encoding="utf-8")
    settings["vision_config"] = str(tmp_path / "vision.json")
    torch.manual_seed(0)
    net = Retrieval(settings, init_backbones=False)
    assert net.temp.item() == pytest.approx(0.07) and net.training
    linear = net.vision_proj[2]
    assert not linear.bias.any() and 0.5e-5 < linear.weight.std() < 2e-5
    assert not net.text_encoder.embeddings.word_embeddings.weight[0].any()
    assert net.text_encoder.fusion_layers[0].crossattention.self.key.weight.shape == (24, 32)
    # Dropouts: tokens of the image, projections, text.
    settings = config("cuhk", itc_dop=0.5)
    settings["vision_config"]["drop_rate"], settings["vision_config"]["drop_path_rate"] = 0.1, 0.2
    settings["text_config"]["attention_probs_dropout_prob"] = 0.3
    net = Retrieval(settings, init_backbones=False)
    assert net.vision_encoder.pos_drop.p == 0.1 and net.vision_proj[1].p == 0.5
    paths = [
        block.drop_path1.drop_prob
        for stage in net.vision_encoder.layers
        for block in stage.blocks
        if hasattr(block.drop_path1, "drop_prob")
    ]
    assert paths == pytest.approx([0.2 * step / 7 for step in range(1, 8)])
    block = net.vision_encoder.layers[1].blocks[0]
    assert (block.mlp.drop1.p, block.mlp.drop2.p, block.attn.proj_drop.p, block.attn.attn_drop.p) == (0.1, 0.1, 0.1, 0)
    assert net.text_encoder.layers[0].attention.dropout == 0.3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vision_config": {"h": 200}}, "multiples of 32"),
        ({"vision_config": {"window_size": 5}}, "windows of 5"),
        ({"vision_config": {"vision_width": 33}}, "vision_width"),
        ({"vision_config": {"num_heads": [1, 1, 2, 5]}}, "5 heads"),
        ({"vision_config": {"depths": [2, 2]}}, "depths"),
        ({"vision_config": {"depths": "2222"}}, "depths"),
        ({"vision_config": {"h": 32, "w": 32, "window_size": 1}}, "fewer than 3"),
        ({"text_config": {"hidden_size": 25}}, "25"),
        ({"text_config": {"fusion_layer": 12}}, "fusion_layer"),
        ({"text_config": {"num_hidden_layers": 8}}, "lr_2"),
        ({"text_config": {"vocab_size": None}}, "vocab_size"),
        ({"text_config": {"hidden_dropout_prob": 1.5}}, "hidden_dropout_prob"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"embed_dim": "2048"}, "embed_dim"),
        ({"temp": 0}, "temp"),
        ({"region": -1}, "region"),
        ({"region_feat": "mine"}, "region_feat"),
        ({"vision_config": "configs/no_such.json"}, "no_such.json does not exist"),
        ({"vision_config": 3}, "vision_config must be"),
    ],
)
def test_impossible_configurations_name_the_key(config: Callable[..., Any], change: dict[str, Any], words: str) -> None:
    settings = config("cuhk")
    for key, value in change.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=words):
        ModelSettings.from_config(settings)


@pytest.mark.parametrize(
    "content, words", [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ("", "is empty")]
)
def test_broken_configuration_files_are_named(
    config: Callable[..., Any], tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "broken.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"broken\.json.*{words}"):
        ModelSettings.from_config(config("cuhk", text_config=str(tmp_path / "broken.json")))
