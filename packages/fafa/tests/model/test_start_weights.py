"""Start weights: LAVIS's files, the bare ViT, BERT, and transformers' own layout against transformers' own model."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fafa import Blip2FAFACPR
from fafa.checkpoint import interpolate_pos_embed, official_state_dict
from tbps_common.errors import CheckpointError

Tiny = Callable[..., Blip2FAFACPR]


def write(state: dict[str, torch.Tensor], path: Path) -> str:
    torch.save({"model": {name: tensor.clone() for name, tensor in state.items()}}, path)
    return str(path)


def test_pretrained_gives_all_but_the_predictor(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny(seed=1)
    state = {name: value for name, value in official_state_dict(source).items() if "mlm_predictor" not in name}
    state["t5_proj.weight"] = torch.zeros(3)
    with caplog.at_level(logging.WARNING, "fafa.model"):
        model = tiny(load_pretrained=True, pretrained=write(state, tmp_path / "blip2_pretrained.pth"))
    assert not caplog.records
    for name, value in official_state_dict(model).items():
        assert torch.equal(value, official_state_dict(source)[name]) != ("mlm_predictor" in name), name


def test_finetuned_wins_over_pretrained(tiny: Tiny, tmp_path: Path) -> None:
    finetuned = write(official_state_dict(tiny(seed=1)), tmp_path / "f.pth")
    model = tiny(load_finetuned=True, finetuned=finetuned, load_pretrained=True, pretrained="/not/read.pth")
    assert torch.equal(model.query_tokens, tiny(seed=1).query_tokens)


def test_nothing_is_loaded_unless_asked_for(tiny: Tiny) -> None:
    tiny(load_pretrained=False, pretrained="/absent.pth", vit_weights="/absent.pth", qformer={"init_from": "/absent"})
    tiny(load_pretrained=True, pretrained="")


def test_lacking_weights_are_reported(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = official_state_dict(tiny(seed=1))
    state.pop("text_proj.weight")
    with caplog.at_level(logging.WARNING, "fafa.model"):
        tiny(load_pretrained=True, pretrained=write(state, tmp_path / "part.pth"))
    assert "text_proj.weight" in caplog.text
    with pytest.raises(CheckpointError, match="holds no weight of this model"):
        tiny(load_pretrained=True, pretrained=write({"a": torch.zeros(1)}, tmp_path / "other.pth"))


@pytest.mark.parametrize("vit_model, key", [("eva_clip_g", "pos_embed"), ("clip_L", "positional_embedding")])
def test_a_bare_vit_of_more_blocks_and_another_grid(tiny: Tiny, tmp_path: Path, vit_model: str, key: str) -> None:
    prefix = "visual_encoder."
    source = tiny(seed=1, vit_model=vit_model, vit_depth=3, image_size=70)
    vit = {
        name.removeprefix(prefix): value.clone()
        for name, value in official_state_dict(source).items()
        if name.startswith(prefix)
    }
    path = tmp_path / "vit.pth"
    torch.save({**vit, "head.weight": torch.zeros(2, 2)}, path)
    model = tiny(vit_model=vit_model, load_pretrained=True, vit_weights=str(path))
    kind = "eva" if vit_model == "eva_clip_g" else "clip"
    for name, value in official_state_dict(model).items():
        if name == prefix + key:
            assert torch.equal(value, interpolate_pos_embed(vit[key], 2, kind))
        elif name.startswith(prefix):
            assert torch.equal(value, vit[name.removeprefix(prefix)])
    torch.save({"head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="vit.pth is missing"):
        tiny(vit_model=vit_model, load_pretrained=True, vit_weights=str(path))


def test_what_a_whole_file_replaces_is_not_fetched(tiny: Tiny, tmp_path: Path) -> None:
    path = write(official_state_dict(tiny(seed=1)), tmp_path / "whole.pth")
    tiny(load_pretrained=True, pretrained=path, vit_weights="/absent.pth", qformer={"init_from": "/absent"})
    state = {name: value for name, value in official_state_dict(tiny()).items() if "visual_encoder" not in name}
    path = write(state, tmp_path / "without_vit.pth")
    with pytest.raises(CheckpointError, match="/absent.pth"):
        tiny(load_pretrained=True, pretrained=path, vit_weights="/absent.pth")


def test_bert_starts_the_qformer(tiny: Tiny, tmp_path: Path, vocabulary: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    words = len(vocabulary.read_text(encoding="utf-8").split())
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=words,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
        )
    )
    bert.save_pretrained(tmp_path)
    model = tiny(load_pretrained=True, qformer={"init_from": str(tmp_path)})
    state, source = official_state_dict(model), bert.state_dict()
    embeddings = state["Qformer.bert.embeddings.word_embeddings.weight"]
    assert len(embeddings) == words + 1  # [DEC]
    assert torch.equal(embeddings[:words], source["bert.embeddings.word_embeddings.weight"])
    for name in ("attention.self.key.weight", "intermediate.dense.weight", "output.LayerNorm.bias"):
        layer = f"bert.encoder.layer.1.{name}"
        assert torch.equal(state[f"Qformer.{layer}"], source[layer])
    for layer in range(2):
        for name in ("intermediate{}.dense.weight", "output{}.dense.bias", "output{}.LayerNorm.weight"):
            stem = f"Qformer.bert.encoder.layer.{layer}."
            assert torch.equal(state[stem + name.format("_query")], state[stem + name.format("")])
    assert torch.equal(
        state["Qformer.cls.predictions.transform.dense.weight"], source["cls.predictions.transform.dense.weight"]
    )
    with pytest.raises(CheckpointError, match="init_from: null"):
        tiny(load_pretrained=True, qformer={"init_from": str(tmp_path / "absent")})


@pytest.fixture
def hf_folder(tmp_path: Path, vocabulary: Path) -> tuple[Path, Any]:
    """A random `Blip2ForImageTextRetrieval` of the tiny model's sizes, saved as transformers saves it."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    torch.manual_seed(9)
    words = len(vocabulary.read_text(encoding="utf-8").split()) + 1
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=int(24 * 4.3637),
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=28,
        patch_size=14,
        initializer_range=0.1,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=words + 3,  # padding rows, as on the hub
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        encoder_hidden_size=24,
        use_qformer_text_input=True,
        initializer_range=0.1,
    )
    text = OPTConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=5,
        image_text_hidden_size=16,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "query_tokens":
                parameter.normal_(std=0.1)
            if name.endswith("qkv.bias"):
                parameter[24:48] = 0  # the key bias does not exist in LAVIS
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def test_transformers_layout_gives_transformers_features(
    tiny: Tiny, hf_folder: tuple[Path, Any], batch: dict[str, Any]
) -> None:
    folder, reference = hf_folder
    model = tiny(load_pretrained=True, pretrained=f"hf:{folder}").eval()
    assert model.temp.item() == pytest.approx(0.07)
    tokens = model.tokenize(batch["text_input"])
    with torch.no_grad():
        vision = reference.vision_model(pixel_values=batch["image"]).last_hidden_state
        queries = reference.query_tokens.expand(4, -1, -1)
        hidden = reference.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
        expected = F.normalize(reference.vision_projection(hidden), dim=-1)
        matching = reference(
            pixel_values=batch["image"],
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            use_image_text_matching_head=True,
        ).logits_per_image
    features, embeds = model.extract_target_features(batch["image"])
    # The library's last norm has epsilon 1e-6 where LAVIS has 1e-5.
    torch.testing.assert_close(embeds, vision, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        ours = model.compute_itm(embeds, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(ours, matching[:, 1], atol=1e-4, rtol=1e-4)


def test_folders_that_are_no_stage_one_model(tiny: Tiny, tmp_path: Path, hf_folder: tuple[Path, Any]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="safetensors"):
        tiny(load_pretrained=True, pretrained=f"hf:{empty}")
    with pytest.raises(CheckpointError, match="clip|EVA"):
        tiny(vit_model="clip_L", load_pretrained=True, pretrained=f"hf:{hf_folder[0]}")
    with pytest.raises(CheckpointError, match="neither a folder nor could it be fetched"):
        tiny(load_pretrained=True, pretrained="hf:nobody/no-such-model")
    from safetensors.torch import save_file

    save_file({"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 24)}, empty / "model.safetensors")
    with pytest.raises(CheckpointError, match="text side"):
        tiny(load_pretrained=True, pretrained=f"hf:{empty}")


def test_a_checkpoint_needs_no_start_weights(tiny_mapping: Callable[..., dict[str, Any]], tiny: Tiny) -> None:
    source = tiny(seed=3)
    mapping = tiny_mapping(load_pretrained=True, pretrained="/absent.pth", vit_weights="/absent.pth")
    model, result = Blip2FAFACPR.from_state_dict(mapping, official_state_dict(source))
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in official_state_dict(model).items():
        assert torch.equal(value, official_state_dict(source)[name])
    for lacking in ("visual_encoder.cls_token", "text_proj.bias"):
        state = {name: value for name, value in official_state_dict(source).items() if name != lacking}
        with pytest.raises(CheckpointError, match="/absent.pth"):
            Blip2FAFACPR.from_state_dict(mapping, state)
        model, result = Blip2FAFACPR.from_state_dict(tiny_mapping(), state)
        assert result.missing_keys == [lacking]
        assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L"])
def test_an_empty_tower_is_one_whose_weights_were_not_drawn(tiny_mapping: Callable[..., Any], vit_model: str) -> None:
    from fafa.model.settings import ModelSettings
    from fafa.model.vit import build_vit

    class Drawn(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_")
            return func(*args, **(kwargs or {}))

    settings = ModelSettings.from_mapping(tiny_mapping(vit_model=vit_model))
    with Drawn() as drawn:
        empty = build_vit(settings, empty=True)
    assert drawn.count == 0
    with drawn:
        full = build_vit(settings)
    assert drawn.count > 10
    empty.load_state_dict(full.state_dict(), strict=True)
    image = torch.randn(2, 3, 28, 28)
    assert torch.equal(empty(image), full(image))


def test_an_empty_tower_does_not_depend_on_what_lies_in_memory(
    tiny_mapping: Callable[..., Any],
) -> None:
    """Large numbers in memory once made the drawing from a truncated distribution endless."""
    from fafa.model.settings import ModelSettings
    from fafa.model.vit import build_vit

    torch.use_deterministic_algorithms(True)  # memory that nobody has filled yet is NaN then
    try:
        empty = build_vit(ModelSettings.from_mapping(tiny_mapping(vit_model="eva_clip_g")), empty=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in empty.parameters())


def test_a_tower_no_file_fills_is_drawn(tiny: Tiny, tmp_path: Path) -> None:
    state = {name: value for name, value in official_state_dict(tiny()).items() if "visual_encoder" not in name}
    model = tiny(load_pretrained=True, pretrained=write(state, tmp_path / "without_vit.pth"))
    table = official_state_dict(model)["visual_encoder.pos_embed"]
    assert table.isfinite().all() and 0.01 < table.std() < 0.03
