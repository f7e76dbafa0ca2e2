"""Weights in every form they come in, and what is said about others."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dp_gen import DiversePersonModel, load_checkpoint, official_state_dict
from dp_gen.checkpoint import main as checkpoint_main
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint

MakeArgs = Callable[..., argparse.Namespace]


@pytest.fixture
def model(small_args: MakeArgs) -> DiversePersonModel:
    torch.manual_seed(1)
    return DiversePersonModel.from_pretrained(small_args())


@pytest.fixture
def other(small_args: MakeArgs) -> DiversePersonModel:
    torch.manual_seed(2)
    return DiversePersonModel.from_pretrained(small_args())


def same(one: DiversePersonModel, two: DiversePersonModel) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_official_layout(model: DiversePersonModel, other: DiversePersonModel) -> None:
    state = official_state_dict(model)
    assert "vae.encoder.mid_block.attentions.0.proj_attn.weight" in state
    assert state["text_encoder.embeddings.position_ids"].shape == (1, 77)
    assert state["image_encoder.vision_model.embeddings.position_ids"].dtype == torch.int64
    assert not any("to_out.0" in name for name in state if name.startswith("vae."))
    assert not same(model, other)
    load_checkpoint(other, state)
    assert same(model, other)


def test_names_of_other_code(model: DiversePersonModel, other: DiversePersonModel) -> None:
    state = {}
    for name, tensor in official_state_dict(model).items():
        if ".proj_attn.weight" in name:
            tensor = tensor[:, :, None, None]
        name = name.replace("text_encoder.", "text_encoder.text_model.").replace("controller.", "postfuse_module.")
        state[f"module.{name}"] = tensor
    state["module.ema_param.0"] = torch.zeros(1)
    load_checkpoint(other, {**state})
    assert same(model, other)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "state folder", "old state folder", "sharded"])
def test_files_and_folders(kind: str, model: DiversePersonModel, other: DiversePersonModel, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in official_state_dict(model).items()}
    source = tmp_path
    if kind == "bin":
        source = tmp_path / "weights.bin"
        save_checkpoint(state, source)
    elif kind == "safetensors":
        source = tmp_path / "weights.safetensors"
        save_file(state, source)
    elif kind == "state folder":
        save_file(state, tmp_path / "model.safetensors")
    elif kind == "old state folder":
        save_checkpoint(state, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(state)
        places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
        for part in set(places.values()):
            save_file({name: state[name] for name in names if places[name] == part}, tmp_path / part)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    load_checkpoint(other, source)
    assert same(model, other)


def test_what_does_not_fit_is_said_and_changes_nothing(model: DiversePersonModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = official_state_dict(model)
    del state["controller.mlp1.fc1.weight"]
    with pytest.raises(CheckpointError, match="missing: controller.mlp1.fc1.weight"):
        load_checkpoint(model, state)
    state = {**official_state_dict(model), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        load_checkpoint(model, state)
    load_checkpoint(model, state, strict=False)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="not next to it"):
        load_checkpoint(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_export(model: DiversePersonModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert checkpoint_main(["export", str(tmp_path), str(tmp_path / "dp.bin")]) == 0
    written, wanted = load_checkpoint_file(tmp_path / "dp.bin"), official_state_dict(model)
    assert written.keys() == wanted.keys() and all(torch.equal(written[name], wanted[name]) for name in wanted)
    target = tmp_path / "fc.safetensors"
    assert checkpoint_main(["export", str(tmp_path), str(target), "--layout", "fastcomposer"]) == 0
    names = set(load_file(target))
    assert "postfuse_module.mlp1.fc1.weight" in names and not any(name.startswith("controller.") for name in names)
    capsys.readouterr()
    assert checkpoint_main(["export", str(tmp_path), str(tmp_path / "x.zip")]) == 2
    assert "must end in" in capsys.readouterr().err
