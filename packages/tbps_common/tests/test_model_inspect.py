"""`tbps-model inspect`: names and shapes without values, from every form of file, and nothing of a file is run."""

import io
import json
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tbps_common.cli import model_main
from tbps_common.errors import CheckpointError
from tbps_common.models.contents import read_contents

STATE = {"a.weight": torch.zeros(3, 2, dtype=torch.float16), "a.bias": torch.zeros(3), "steps": torch.tensor(7)}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def by_torch(path: Path) -> None:
    torch.save({"model": OrderedDict(STATE), "epoch": 3, "args": Namespace(x=1), "best": np.float64(0.5)}, path)


def by_old_torch(path: Path) -> None:
    content = {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"net": STATE, "epoch": 3}))


def by_safetensors(path: Path) -> None:
    save_file(STATE, path)


def as_parameters(path: Path) -> None:
    torch.save({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in STATE.items()}, path)


@pytest.mark.parametrize("write", [by_torch, by_old_torch, by_pickle, by_safetensors, as_parameters])
def test_every_form_gives_names_shapes_and_types_without_values(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "file")
    contents = read_contents(tmp_path / "file")
    assert shapes(contents.state) == shapes(STATE)
    assert all(tensor.is_meta for tensor in contents.state.values())
    assert write in (by_safetensors, as_parameters) or contents.beside["epoch"] == 3


def test_a_torchscript_archive_is_read_without_building_its_program(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)
            self.register_buffer("size", torch.tensor(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.jit.save(torch.jit.script(Net()), tmp_path / "net.pt")
    contents = read_contents(tmp_path / "net.pt")
    assert contents.form == "TorchScript archive"
    assert shapes(contents.state) == shapes(dict(Net().state_dict()))


class Hostile:
    def __reduce__(self) -> Any:
        return open, ("ran.txt", "w")


@pytest.mark.parametrize("by", [pickle.dump, torch.save])
def test_nothing_that_a_file_asks_for_is_called(by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("evil.pt", "wb") as stream:
        by({"model": STATE, "extra": Hostile()}, stream)
    contents = read_contents("evil.pt")
    assert shapes(contents.state) == shapes(STATE)
    assert repr(contents.beside["extra"]) in ("<io.open>", "<_io.open>")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_folders_of_the_hub_shards_and_pipelines_are_read(tmp_path: Path) -> None:
    whole, sharded, pipeline = (tmp_path / name for name in ("whole", "sharded", "pipeline"))
    for folder in (whole, sharded, pipeline / "unet", pipeline / "vae"):
        folder.mkdir(parents=True)
    save_file(STATE, whole / "model.safetensors")
    (whole / "config.json").write_text('{"width": 3}', encoding="utf-8")
    assert read_contents(whole).config == read_contents(whole / "model.safetensors").config == {"width": 3}
    names = list(STATE)
    save_file({names[0]: STATE[names[0]]}, sharded / "1.safetensors")
    save_file({name: STATE[name] for name in names[1:]}, sharded / "2.safetensors")
    places = {name: f"{1 if name == names[0] else 2}.safetensors" for name in names}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    assert shapes(read_contents(sharded).state) == shapes(STATE)
    for part in ("unet", "vae"):
        save_file(STATE, pipeline / part / "diffusion_pytorch_model.safetensors")
    assert set(read_contents(pipeline).state) == {f"{part}.{name}" for part in ("unet", "vae") for name in STATE}
    (sharded / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2.safetensors is missing"):
        read_contents(sharded)


def test_sizes_that_belong_to_no_model_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    layer = ("attention.self.query.weight", "output.dense.weight")
    names = (*(f"bert.{name}" for name in names), *(f"bert.encoder.layer.0.{name}" for name in layer))
    torch.save(
        {**{name: torch.zeros(2) for name in names}, "a\x1b[31m": torch.zeros(1), "nan": float("nan")},
        tmp_path / "f.pt",
    )
    assert model_main(["inspect", str(tmp_path / "f.pt"), "--names", "--json", str(tmp_path / "out.json")]) == 1
    shown = capsys.readouterr().out
    assert "layout:      BERT" in shown and "compared:    no: " in shown and "\x1b" not in shown


def test_an_unknown_file_gives_its_shapes_and_the_nearest_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_torch(tmp_path / "file.pt")
    assert model_main(["inspect", str(tmp_path / "file.pt"), "--names", "--json", str(tmp_path / "out.json")]) == 1
    shown = capsys.readouterr().out
    assert "layout:      unknown, and near to none" in shown and "  a.weight [3, 2] float16" in shown
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["layout"] is None and found["parameters"] == 10 and found["beside"]["args"] == "<argparse.Namespace>"
    assert len(found["sha256"]["file.pt"]) == 64


def test_a_model_inside_another_is_near_to_its_own_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight")
    torch.save({f"student.{name}": torch.zeros(2) for name in names}, tmp_path / "file.pt")
    assert model_main(["inspect", str(tmp_path / "file.pt")]) == 1
    assert "unknown; nearest is BERT" in capsys.readouterr().out


def truncated(path: Path) -> None:
    by_torch(path)
    path.write_bytes(path.read_bytes()[:200])


def half_a_pickle(path: Path) -> None:
    by_pickle(path)
    path.write_bytes(path.read_bytes()[:60])


def wrong_stack(path: Path) -> None:
    path.write_bytes(b"\x80\x02ssss.")


def huge_tensor(path: Path) -> None:
    by_torch(path)
    buffer = io.BytesIO()
    pickle.dump({"model": (1 << 70, "tensor")}, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"model": [0] * 1000}))


def in_itself(path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    torch.save(content, path)


def endless_text(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"abc.")


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        half_a_pickle,
        wrong_stack,
        huge_tensor,
        other_zip,
        compressed,
        in_itself,
        endless_text,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello", encoding="utf-8"),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
)
def test_what_cannot_be_read_is_one_line(
    write: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "file.pt")
    assert model_main(["inspect", str(tmp_path / "file.pt")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and str(tmp_path) in shown.err
