"""Checkpoints: round trips, other forms of files, and what does not fit."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fafa import Blip2FAFACPR
from fafa.checkpoint import (
    interpolate_pos_embed,
    load_checkpoint,
    load_official_state_dict,
    official_named_parameters,
    official_state_dict,
    save_model,
)
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file

Tiny = Callable[..., Blip2FAFACPR]


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L"])
@pytest.mark.parametrize("mode", ["epoch", "step"])
def test_saved_models_load_back_whole(tiny: Tiny, tmp_path: Path, vit_model: str, mode: str) -> None:
    model, other = tiny(vit_model=vit_model), tiny(seed=1, vit_model=vit_model)
    path = save_model("tuned_recall_at1_step", 12, model, tmp_path, mode)
    assert path == tmp_path / "saved_models" / "tuned_recall_at1_step.pt"
    content = load_checkpoint_file(path)
    assert list(content) == [mode, "model"] and content[mode] == 12
    assert list(content["model"]) == list(official_state_dict(model))
    assert not same(model, other)
    result = load_checkpoint(other, path, strict=True)
    assert not result.missing_keys and not result.unexpected_keys and same(model, other)


def test_a_wrapped_model_is_saved_without_its_wrapper(tiny: Tiny, tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    path = save_model("wrapped", 0, Wrapper(tiny()), tmp_path)
    assert "query_tokens" in load_checkpoint_file(path)["model"]
    with pytest.raises(ValueError, match="mode"):
        save_model("x", 0, tiny(), tmp_path, "batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["bare", "state_dict", "module.", "ordered", "safetensors"])
def test_other_forms_of_files(tiny: Tiny, tmp_path: Path, form: str) -> None:
    model, other = tiny(), tiny(seed=1)
    state = {name: tensor.clone() for name, tensor in official_state_dict(model).items()}
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        content: Any = {
            "bare": state,
            "state_dict": {"state_dict": state, "epoch": 3},
            "module.": {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
            "ordered": OrderedDict(state),
        }[form]
        torch.save(content, path)
    load_checkpoint(other, path, strict=True)
    assert same(model, other)


def test_missing_twins_and_position_ids_are_no_news(tiny: Tiny) -> None:
    model = tiny()
    state = official_state_dict(model)
    for key in (
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
    ):
        state.pop(key)
    other = tiny(seed=1)
    result = load_official_state_dict(other, state, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == [] and same(model, other)


def test_without_both_twins_both_are_missing(tiny: Tiny) -> None:
    state = official_state_dict(tiny())
    names = ["Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.decoder.weight"]
    for name in names:
        state.pop(name)
    state["other"] = torch.zeros(1)
    result = load_official_state_dict(tiny(), state)
    assert result.missing_keys == names and result.unexpected_keys == ["other"]
    with pytest.raises(RuntimeError, match="word_embeddings.*other"):
        load_official_state_dict(tiny(), state, strict=True)


def test_tied_tensors_are_written_once(tiny: Tiny, tmp_path: Path) -> None:
    state = official_state_dict(tiny())
    twin = state["Qformer.cls.predictions.decoder.weight"]
    assert twin.data_ptr() == state["Qformer.bert.embeddings.word_embeddings.weight"].data_ptr()
    assert torch.equal(state["Qformer.bert.embeddings.position_ids"], torch.arange(40)[None])
    names = [name for name, _ in official_named_parameters(tiny())]
    assert len(names) == len(set(names)) and not any("decoder" in name for name in names)


@pytest.mark.parametrize("rows", [3, 8])
def test_query_tokens_of_another_number(tiny: Tiny, rows: int) -> None:
    source, model = tiny(seed=1, num_query_token=rows), tiny()
    before = model.query_tokens.detach().clone()
    result = load_official_state_dict(model, official_state_dict(source), strict=True)
    assert not result.missing_keys
    shared = min(rows, 5)
    assert torch.equal(model.query_tokens[:, :shared], source.query_tokens[:, :shared])
    assert torch.equal(model.query_tokens[:, shared:], before[:, shared:])


@pytest.mark.parametrize("vit_model, key", [("eva_clip_g", "pos_embed"), ("clip_L", "positional_embedding")])
def test_a_checkpoint_of_another_resolution_is_interpolated(tiny: Tiny, vit_model: str, key: str) -> None:
    source, model = tiny(seed=1, vit_model=vit_model, image_size=70), tiny(vit_model=vit_model)
    state = official_state_dict(source)
    load_official_state_dict(model, state, strict=True)
    kind = "eva" if vit_model == "eva_clip_g" else "clip"
    table = state[f"visual_encoder.{key}"]
    expected = interpolate_pos_embed(table, 2, kind)
    assert torch.equal(official_state_dict(model)[f"visual_encoder.{key}"], expected)


def test_interpolation_keeps_the_class_token_and_a_constant_grid() -> None:
    table = torch.full((1, 10, 4), 2.0, dtype=torch.float16)
    table[:, 0] = 5.0
    resized = interpolate_pos_embed(table, 7, "eva")
    assert resized.shape == (1, 50, 4) and resized.dtype == torch.float16
    assert (resized[:, 0] == 5).all() and torch.allclose(resized[:, 1:], torch.tensor(2.0, dtype=torch.float16))
    assert interpolate_pos_embed(table, 3, "eva") is table
    flat = torch.randn(10, 4)
    corners = interpolate_pos_embed(flat, 5, "clip")[1:].view(5, 5, 4)
    torch.testing.assert_close(
        corners[[0, 0, -1, -1], [0, -1, 0, -1]], flat[1:].view(3, 3, 4)[[0, 0, 2, 2], [0, 2, 0, 2]]
    )
    for bad in (torch.randn(1, 9, 4), torch.randn(10, 4)):
        with pytest.raises(ValueError, match="square grid"):
            interpolate_pos_embed(bad, 2, "eva")
    with pytest.raises(ValueError, match="kind"):
        interpolate_pos_embed(table, 2, "vit")


def test_a_wrong_shape_changes_nothing(tiny: Tiny) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = official_state_dict(tiny(seed=1))
    state["vision_proj.weight"] = torch.zeros(16, 31)
    state["temp"] = torch.zeros(1)
    state["itm_head.bias"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"temp \[1\] instead of \[\].*vision_proj.weight \[16, 31\]"):
        load_official_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_other_backbones_checkpoint_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    path = save_model("clip", 0, tiny(vit_model="clip_L"), tmp_path)
    with pytest.raises(RuntimeError, match="clip.pt.*visual_encoder"):
        load_checkpoint(tiny(), path, strict=True)


def test_half_precision_files_load_into_a_float32_model(tiny: Tiny, tmp_path: Path) -> None:
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in official_state_dict(tiny()).items()
    }
    torch.save({"model": state}, tmp_path / "half.pth")
    model = tiny(seed=1)
    load_checkpoint(model, tmp_path / "half.pth", strict=True)
    assert model.vision_proj.weight.dtype == torch.float32
    torch.testing.assert_close(model.vision_proj.weight.half(), state["vision_proj.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_files_are_one_sentence(tiny: Tiny, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged.pt") as caught:
        load_checkpoint(tiny(), path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_and_a_missing_one(tiny: Tiny, tmp_path: Path) -> None:
    path = save_model("whole", 0, tiny(), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for file in (path, tmp_path / "absent.pt", tmp_path):
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(tiny(), file)


@pytest.mark.parametrize("url", ["http://example.org/a.pth", "ftp://example.org/a.pth", "https://example.org/a.pth"])
def test_addresses_that_may_not_be_fetched(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="https only|offline|OFFLINE"):
        load_checkpoint(tiny(), url)


def test_a_cached_download_is_taken_by_its_name(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    model, other = tiny(), tiny(seed=1)
    torch.save({"model": official_state_dict(model)}, cache / "blip2.pth")
    load_checkpoint(other, "https://example.org/some/where/blip2.pth", strict=True)
    assert same(model, other)
