"""Checkpoint folders: round trips, the rules of loading, and what is said when a folder cannot be used."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diana import DiaNAConfig, DiaNAModel, load_diana
from tbps_common.errors import CheckpointError

Make = Callable[..., DiaNAModel]


@pytest.fixture
def saved(tiny_model: Make, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint folder of the tiny model, with its tokenizer."""
    folder = tmp_path / "ckpt"
    shutil.copytree(tokenizer_folder, folder)
    tiny_model().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors")


def test_round_trip(saved: Path, tiny_model: Make, batch: dict[str, torch.Tensor]) -> None:
    model, original = DiaNAModel.from_pretrained(saved), tiny_model()
    assert not model.training and model.dtype == torch.float32
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())
    assert model(**batch).loss.item() == original(**batch).loss.item()
    stored = json.loads((saved / "config.json").read_text())
    assert stored["model_type"] == "main" and stored["architectures"] == ["DiaNAModel"]
    assert stored["dtype"] == stored["torch_dtype"] == "float32" and stored["hidden_size"] == 32
    assert stored["vision_config"]["num_channels"] == 3 and stored["llama_config"]["rms_norm_eps"] == 1e-6
    assert "pretrained" not in stored["vision_config"]


def test_backbone_paths_are_neither_needed_nor_kept(saved: Path) -> None:
    stored = json.loads((saved / "config.json").read_text())
    edit_config(
        saved,
        vision_config={**stored["vision_config"], "pretrained": "/nowhere/swin"},
        llama_config={**stored["llama_config"], "pretrained": "/nowhere/llama"},
    )
    DiaNAModel.from_pretrained(saved).save_pretrained(saved)
    assert "/nowhere" not in (saved / "config.json").read_text()


def test_unknown_settings_survive(saved: Path) -> None:
    edit_config(saved, label_smoothing=0.0, id2label={"0": "LABEL_0"}, force_image_size=None)
    config = DiaNAConfig.from_pretrained(saved)
    assert config.label_smoothing == 0.0
    assert config.to_dict()["id2label"] == {"0": "LABEL_0"} and config.to_dict()["force_image_size"] is None


@pytest.mark.parametrize(
    "keys, argument, expected",
    [
        ({"dtype": "bfloat16", "torch_dtype": None}, None, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "torch.float16"}, None, torch.float16),
        ({"dtype": None, "torch_dtype": None}, None, torch.float32),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, torch.float32, torch.float32),
    ],
)
def test_dtype(saved: Path, keys: dict[str, Any], argument: torch.dtype | None, expected: torch.dtype) -> None:
    edit_config(saved, **keys)
    model = DiaNAModel.from_pretrained(saved, dtype=argument)
    assert {value.dtype for value in model.state_dict().values()} == {expected}


def test_a_half_precision_copy(saved: Path, tmp_path: Path) -> None:
    DiaNAModel.from_pretrained(saved).save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    model = DiaNAModel.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    # Trained with exact rotary frequencies, evaluated with exact ones.
    assert model.llama_tower.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(
        model.llama_tower.rotary_emb.inv_freq, DiaNAModel.from_pretrained(saved).llama_tower.rotary_emb.inv_freq
    )


def test_the_newest_complete_checkpoint_is_taken(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (2, 10, 9):
        shutil.copytree(saved, out / f"checkpoint-{step}")
    (out / "checkpoint-11").mkdir()
    shutil.copy(saved / "config.json", out / "checkpoint-11")  # killed before its weights were there
    edit_config(out / "checkpoint-10", logit_scale=33)
    assert DiaNAModel.from_pretrained(out).config.logit_scale == 33
    assert DiaNAConfig.from_pretrained(out).logit_scale == 50  # a configuration needs no weights


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_damaged_weights_are_passed_over_for_sound_ones(
    kept: int, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (9, 10):
        shutil.copytree(saved, tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / "checkpoint-10" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:kept])
    edit_config(tmp_path / "checkpoint-9", logit_scale=33)
    assert DiaNAModel.from_pretrained(tmp_path).config.logit_scale == 33
    assert "checkpoint-10 are damaged" in caplog.text and "checkpoint-9 is used" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        DiaNAModel.from_pretrained(tmp_path / "checkpoint-10")


def test_shards_and_torch_files(saved: Path, tiny_model: Make, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    names = sorted(state)
    (saved / "model.safetensors").unlink()
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name].clone() for name in part}, saved / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    expected = tiny_model().state_dict()
    loaded = DiaNAModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())

    (saved / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2-of-2.safetensors is missing"):
        DiaNAModel.from_pretrained(saved)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not in its folder"):
        DiaNAModel.from_pretrained(saved)

    index.unlink()
    torch.save({f"module.{name}": value.clone() for name, value in state.items()}, saved / "pytorch_model.bin")
    loaded = DiaNAModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_buffers_and_legacy_names_are_ignored(saved: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["refiner.query_token"] = torch.zeros(1)
        state["llama.rotary_emb.inv_freq"] = torch.zeros(4)
        state["vision_model.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(16)
        state["vision_model.encoder.layers.0.blocks.0.attention.self.relative_coords_table"] = torch.zeros(16)

    edit_weights(saved, change)
    DiaNAModel.from_pretrained(saved)


def test_another_number_of_queries(saved: Path, tiny_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(refiner_config={"num_query": 300})
    model = DiaNAModel.from_pretrained(saved, config)
    assert model.refiner.attr_query_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(caplog.records) == 1 and "refiner.attr_query_token" in caplog.text


def test_a_refiner_that_the_file_lacks_is_new_and_one_that_is_off_is_ignored(
    tiny_model: Make, tiny_config: Any, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = tiny_model(refiner_config={"enable_refiner": False})
    without.save_pretrained(tmp_path / "without")
    model = DiaNAModel.from_pretrained(tmp_path / "without", tiny_config())
    assert len(caplog.records) == 1 and "refiner." in caplog.text
    assert model.refiner.cross_attn.in_proj_weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    caplog.clear()
    assert DiaNAModel.from_pretrained(saved, tiny_config(refiner_config={"enable_refiner": False})).refiner is None
    assert not caplog.records


def test_the_old_name_of_the_refiner_switch() -> None:
    on = DiaNAConfig({}, {}, {"enable": True})
    assert on.enable_refiner and on.refiner_config["num_query"] == 32 and not on.enable_sdm
    assert not DiaNAConfig({}, {}, {"enable": True, "enable_refiner": False}).enable_refiner


def test_adapters_survive_and_merge(
    saved: Path, tiny_config: Any, tmp_path: Path, batch: Any, tokenizer_folder: Path
) -> None:
    model = DiaNAModel.from_pretrained(saved, tiny_config(use_llama_lora=2))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    loss = model(**batch).loss.item()
    adapted = tmp_path / "adapted"
    shutil.copytree(tokenizer_folder, adapted)
    model.save_pretrained(adapted)
    again = DiaNAModel.from_pretrained(adapted)
    assert sorted(again.state_dict()) == sorted(model.state_dict()) and again(**batch).loss.item() == loss
    merged, _ = load_diana(adapted)
    assert sorted(merged.state_dict()) == sorted(load_file(saved / "model.safetensors"))
    assert merged(**batch).loss.item() == pytest.approx(loss, rel=1e-5)
    merged.save_pretrained(adapted)
    assert DiaNAModel.from_pretrained(adapted)(**batch).loss.item() == pytest.approx(loss, rel=1e-5)


def test_adapters_without_a_rank_are_refused(saved: Path, tiny_config: Any, tmp_path: Path) -> None:
    DiaNAModel.from_pretrained(saved, tiny_config(use_llama_lora=2)).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"LoRA adapters.*rank \(2\)"):
        DiaNAModel.from_pretrained(tmp_path / "a", tiny_config())


def test_backbone_folders(tiny_model: Make, tiny_config: Any, tmp_path: Path) -> None:
    source = tiny_model()
    vision = {f"swinv2.{name}": value.clone() for name, value in source.vision_model.state_dict().items()}
    llama = {f"model.{name}": value.clone() for name, value in source.llama_tower.state_dict().items()}
    folders = []
    for name, state in (
        ("swin", {**vision, "classifier.bias": torch.zeros(2)}),
        ("llama", {**llama, "lm_head.weight": torch.zeros(2, 2)}),
    ):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text("{}", encoding="utf-8")
        save_file(state, folders[-1] / "model.safetensors")
    torch.manual_seed(5)
    model = DiaNAModel.from_backbones(tiny_config(), *folders)
    own, given = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in own if name.startswith(("llama.", "vision_model.")))
    assert not torch.equal(own["text_projection.weight"], given["text_projection.weight"])
    adapted = DiaNAModel.from_backbones(tiny_config(use_llama_lora=2), *folders)
    assert adapted.config.use_llama_lora == 2 and any("lora_A" in name for name in adapted.state_dict())
    with pytest.raises(CheckpointError, match="does not fit this model"):
        DiaNAModel.from_backbones(tiny_config(llama_config={"hidden_size": 64}), *folders)
    with pytest.raises(CheckpointError, match="does not exist"):
        DiaNAModel.from_backbones(tiny_config(), folders[0], tmp_path / "absent")


def test_a_gathered_state_dict_is_what_is_saved(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    gathered = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert not any(value.any() for value in load_file(tmp_path / "model.safetensors").values())


def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def half_written(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diana.model.weights.save_file", half_written)
    with pytest.raises(OSError, match="No space"):
        tiny_model(logit_scale=20).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert DiaNAConfig.from_pretrained(saved).logit_scale == 50 and not list(saved.glob(".*"))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "holds no DiaNA checkpoint"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "only a LoRA adapter"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is missing vision_config"),
        (lambda folder: edit_config(folder, refiner_config=None), "is missing refiner_config"),
        (lambda folder: edit_config(folder, embed_dim="wide"), "config.json cannot be used: embed_dim"),
        (lambda folder: edit_config(folder, embed_dim=128), "does not fit this model: .*text_projection.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "config.json but no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "not a readable safetensors file"),
        (
            lambda folder: edit_weights(folder, lambda state: state.pop("llama.norm.weight")),
            "missing: llama.norm.weight",
        ),
        (lambda folder: edit_weights(folder, lambda state: state.update(x=torch.zeros(1))), "unexpected: x"),
    ],
)
def test_damaged_folders(saved: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=words) as caught:
        DiaNAModel.from_pretrained(saved)
    assert "\n" not in str(caught.value) and saved.name in str(caught.value)


def test_a_truncated_weight_file(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (saved / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match="model.safetensors"):
            DiaNAModel.from_pretrained(saved)


def test_names_that_are_no_folders(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="placeholder"):
        DiaNAModel.from_pretrained("<Swin Transformer Root>/swinv2")
    with pytest.raises(CheckpointError, match="is a file"):
        DiaNAModel.from_pretrained(saved / "config.json")
    with pytest.raises(CheckpointError, match="byougert/DiaNA is neither a folder nor could it be fetched"):
        DiaNAModel.from_pretrained("byougert/DiaNA")  # HF_HUB_OFFLINE is set for all tests


def test_load_diana(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_diana(saved, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training and not caplog.records
    assert tokenizer.pad_token_id is not None and tokenizer.mask_token_id is not None


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(saved: Path) -> None:
    """It would end in an index error, on a GPU in one that names nothing."""
    _, tokenizer = load_diana(saved)
    tokenizer.add_tokens([f"<word {number}>" for number in range(2000)])
    tokenizer.save_pretrained(str(saved))
    with pytest.raises(CheckpointError, match="take the tokenizer that belongs to the weights"):
        load_diana(saved)
