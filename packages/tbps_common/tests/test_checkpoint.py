"""Checkpoints: whole or not there, read without running code, fitted strictly."""

import argparse
import collections
import errno
import functools
import io
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import (
    find_state_dict,
    fingerprint,
    load_checkpoint_file,
    load_state_dict_strictly,
    save_checkpoint,
)


def training_state(width: int = 8) -> dict[str, Any]:
    """What a training run saves: weights, AdamW and scheduler states, numbers, strings, lists."""
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "best_top1": 71.25,
        "milestones": (20, 50),
    }


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert type(left) is type(right) and len(left) == len(right)
        for a, b in zip(left, right):
            assert_equal(a, b)
    else:
        assert type(left) is type(right) and left == right


class TestRoundTrip:
    def test_a_training_state(self, tmp_path: Path) -> None:
        state = training_state()
        save_checkpoint(state, tmp_path / "run" / "last.pth")
        assert os.listdir(tmp_path / "run") == ["last.pth"]
        assert_equal(load_checkpoint_file(tmp_path / "run" / "last.pth"), state)
        assert_equal(load_checkpoint_file(tmp_path / "run" / "last.pth", mmap=True), state)

    def test_the_older_format_without_archive(self, tmp_path: Path) -> None:
        state = {"model": {"w": torch.arange(5.0)}, "epoch": 1}
        torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert_equal(load_checkpoint_file(tmp_path / "old.pth"), state)
        assert_equal(load_checkpoint_file(tmp_path / "old.pth", mmap=True), state)

    @pytest.mark.parametrize("mmap", [False, True])
    def test_safetensors_can_be_changed_without_changing_the_file(self, tmp_path: Path, mmap: bool) -> None:
        save_file({"w": torch.zeros(3), "h": torch.ones(2, 2).half()}, tmp_path / "a.safetensors")
        state = load_checkpoint_file(str(tmp_path / "a.safetensors"), mmap=mmap)
        assert state["h"].dtype == torch.float16
        state["w"] += 1
        assert torch.equal(load_checkpoint_file(tmp_path / "a.safetensors")["w"], torch.zeros(3))

    def test_archives_without_checksums_are_read(self, tmp_path: Path) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"w": torch.arange(9.0), "v": torch.ones(3)}, tmp_path / "a.pth")
        finally:
            torch.serialization.set_crc32_options(before)
        assert torch.equal(load_checkpoint_file(tmp_path / "a.pth")["w"], torch.arange(9.0))


class TestStandIns:
    """Values outside torch's own list that checkpoints of this field hold."""

    @pytest.mark.parametrize(
        "value",
        [
            np.float64(71.3),
            np.float32(0.1),
            np.int64(-3),
            np.bool_(True),
            np.arange(6).reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(3, dtype=">i4"),
            np.array(["a", "行人"]),
            np.zeros((0, 4), np.float16),
            np.array(2.5),
        ],
        ids=repr,
    )
    def test_numpy_comes_back_as_numpy(self, tmp_path: Path, value: Any) -> None:
        torch.save({"model": {"w": torch.ones(2)}, "best": [value], "nested": ({"v": value},)}, tmp_path / "a.pth")
        loaded = load_checkpoint_file(tmp_path / "a.pth")
        for found in (loaded["best"][0], loaded["nested"][0]["v"]):
            assert type(found) is type(value) and found.dtype == value.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found, value)

    def test_dtype(self, tmp_path: Path) -> None:
        torch.save({"dtype": np.dtype("float16")}, tmp_path / "a.pth")
        assert load_checkpoint_file(tmp_path / "a.pth")["dtype"] == np.dtype("float16")

    def test_numpy_1_names(self, tmp_path: Path) -> None:
        torch.save({"best": np.float64(71.3)}, tmp_path / "new.pth")
        rewrite_pickle(tmp_path / "new.pth", tmp_path / "old.pth", b"numpy._core.multiarray", b"numpy.core.multiarray")
        assert load_checkpoint_file(tmp_path / "old.pth")["best"] == np.float64(71.3)

    def test_a_ruamel_mapping_becomes_a_dict(self, tmp_path: Path, ruamel: types.SimpleNamespace) -> None:
        config = ruamel.mapping(lr=ruamel.number(1e-4), inner=ruamel.mapping(size=224))
        torch.save({"model": {"w": torch.ones(2)}, "config": config}, tmp_path / "a.pth")
        loaded = load_checkpoint_file(tmp_path / "a.pth")["config"]
        assert type(loaded) is dict and loaded == {"lr": 1e-4, "inner": {"size": 224}}
        assert type(loaded["lr"]) is float

    def test_a_ruamel_sequence_with_remarks_is_refused_by_name(
        self, tmp_path: Path, ruamel: types.SimpleNamespace
    ) -> None:
        torch.save({"sizes": ruamel.sequence(1, 2)}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=r"ruamel\.yaml\.comments\.CommentedSeq.*--trust-checkpoint"):
            load_checkpoint_file(tmp_path / "a.pth")

    def test_the_list_is_not_left_open(self, tmp_path: Path) -> None:
        before = set(torch.serialization.get_safe_globals())
        torch.save({"best": np.float64(71.3)}, tmp_path / "a.pth")
        load_checkpoint_file(tmp_path / "a.pth")
        assert set(torch.serialization.get_safe_globals()) == before

    def test_object_arrays_are_refused(self, tmp_path: Path) -> None:
        torch.save({"a": np.array([{}], dtype=object)}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="a.pth"):
            load_checkpoint_file(tmp_path / "a.pth")


@pytest.fixture
def ruamel(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes that pickle under ruamel.yaml's names, with its attributes beside the values, without the library."""

    def named(module: str, name: str, bases: tuple[type, ...]) -> Any:
        kind = type(name, bases, {"__module__": module})
        holder = sys.modules.get(module) or types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, holder)
        monkeypatch.setattr(holder, name, kind, raising=False)
        return kind

    monkeypatch.setitem(sys.modules, "ruamel", types.ModuleType("ruamel"))
    monkeypatch.setitem(sys.modules, "ruamel.yaml", types.ModuleType("ruamel.yaml"))
    comments = "ruamel.yaml.comments"
    mapping = named(comments, "CommentedMap", (collections.OrderedDict,))
    sequence = named(comments, "CommentedSeq", (list,))
    line_column = named(comments, "LineCol", ())
    number = named("ruamel.yaml.scalarfloat", "ScalarFloat", (float,))

    def remarked(value: Any) -> Any:
        value._yaml_line_col = line_column()
        value._yaml_line_col.line = 3
        return value

    return types.SimpleNamespace(
        mapping=lambda **entries: remarked(mapping(entries)),
        sequence=lambda *entries: remarked(sequence(entries)),
        number=lambda value: remarked(number(value)),
    )


def rewrite_pickle(source: Path, target: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            copy.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


class Call:
    """Un-pickling an instance calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile_payloads(canary: Path) -> dict[str, Any]:
    command = f"touch {canary}"
    return {
        "os.system": Call(os.system, command),
        "subprocess.call": Call(subprocess.call, ["touch", str(canary)]),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "io.open": Call(io.open, str(canary), "w"),
        "import": Call(__import__, "antigravity"),
        "copyfile": Call(shutil.copyfile, __file__, str(canary)),
        "Path.touch": Call(pathlib.Path.touch, canary),
        "os.mkdir": Call(os.mkdir, str(canary)),
        "partial": Call(functools.partial(os.system, command)),
        "getattr": Call(getattr, "text", "upper"),
        "torch.load": Call(torch.load, "x.pth"),
        "torch.save": Call(torch.save, 1, str(canary)),
        "numpy.fromfile": Call(np.fromfile, __file__),
        "numpy.memmap": Call(np.memmap, str(canary), "u1", "w+", 0, 4),
        "sys.exit": Call(sys.exit, 0),
        "os._exit": Call(os._exit, 0),
        "namespace": argparse.Namespace(lr=1),
        "path": pathlib.PurePosixPath("a"),
        "defaultdict": collections.defaultdict(list, a=[1]),
        "module": nn.Linear(2, 2),
    }


class TestHostileFiles:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("name", list(hostile_payloads(Path("canary"))))
    def test_nothing_runs_and_the_global_is_named(self, tmp_path: Path, name: str, legacy: bool) -> None:
        canary, file = tmp_path / "canary", tmp_path / "evil.pth"
        payload = hostile_payloads(canary)[name]
        torch.save({"model": {"w": torch.ones(2)}, "x": payload}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint_file(file)
        message = str(caught.value)
        assert str(file) in message and "--trust-checkpoint" in message and "\n" not in message
        assert not canary.exists()

    def test_trust_reads_what_the_user_vouches_for(self, tmp_path: Path) -> None:
        torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
        assert load_checkpoint_file(tmp_path / "a.pth", trust=True)["args"].lr == 1

    def test_a_program_is_not_a_checkpoint(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
            for name in ("clip/data.pkl", "clip/constants.pkl", "clip/code/__torch__.py"):
                archive.writestr(name, b"")
        with pytest.raises(CheckpointError, match="TorchScript"):
            load_checkpoint_file(tmp_path / "clip.pt")

    def test_compressed_records_are_refused(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(100_000)}, tmp_path / "a.pth")
        with (
            zipfile.ZipFile(tmp_path / "a.pth") as archive,
            zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for name in archive.namelist():
                bomb.writestr(name, archive.read(name))
        with pytest.raises(CheckpointError, match="compressed"):
            load_checkpoint_file(tmp_path / "bomb.pth")


class TestDamagedFiles:
    @pytest.fixture
    def sound(self, tmp_path: Path) -> Path:
        save_checkpoint(training_state(), tmp_path / "sound.pth")
        return tmp_path / "sound.pth"

    def refuse(self, file: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint_file(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("trust", [False, True])
    def test_absent_empty_and_folder(self, tmp_path: Path, trust: bool) -> None:
        (tmp_path / "empty.pth").touch()
        for name, reason in (("none.pth", "does not exist"), ("empty.pth", "empty"), (".", "folder"), ("a\0b", "path")):
            with pytest.raises(CheckpointError, match=reason):
                load_checkpoint_file(tmp_path / name, trust=trust)

    @pytest.mark.parametrize("part", range(20))
    def test_cut_off(self, sound: Path, part: int) -> None:
        content = sound.read_bytes()
        cut = sound.with_name("cut.pth")
        cut.write_bytes(content[: max(1, len(content) * part // 20)])
        self.refuse(cut)

    @pytest.mark.parametrize("part", range(20))
    def test_older_format_cut_off(self, tmp_path: Path, part: int) -> None:
        torch.save(training_state(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        content = (tmp_path / "a.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(content[: max(1, len(content) * part // 20)])
        self.refuse(tmp_path / "cut.pth")

    def test_flipped_bits_never_become_other_values(self, sound: Path) -> None:
        expected = load_checkpoint_file(sound)
        content = bytearray(sound.read_bytes())
        flipped = sound.with_name("flipped.pth")
        refused = 0
        for position in range(3, len(content), len(content) // 150):
            content[position] ^= 0x10
            flipped.write_bytes(content)
            try:
                found = load_checkpoint_file(flipped)
            except CheckpointError:
                refused += 1
            else:
                assert_equal(found, expected)  # the bit was in the padding or in a time stamp
            content[position] ^= 0x10
        assert refused >= 30

    @pytest.mark.parametrize("part", range(10))
    def test_safetensors_cut_off(self, tmp_path: Path, part: int) -> None:
        save_file({"w": torch.zeros(50), "v": torch.ones(3)}, tmp_path / "a.safetensors")
        content = (tmp_path / "a.safetensors").read_bytes()
        (tmp_path / "b.safetensors").write_bytes(content[: max(1, len(content) * part // 10)])
        self.refuse(tmp_path / "b.safetensors")

    @pytest.mark.parametrize("content", [b"\x80\x02.", b"not a checkpoint", b"PK\x03\x04", b"\x80\x02}q\x00.", b"{}"])
    def test_other_files(self, tmp_path: Path, content: bytes) -> None:
        for name in ("a.pth", "a.safetensors"):
            (tmp_path / name).write_bytes(content)
            self.refuse(tmp_path / name)

    def test_another_zip_file(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("readme.txt", "hello")
        self.refuse(tmp_path / "a.pth")


class TestSaving:
    def test_a_full_disk_keeps_the_old_file(self, tmp_path: Path) -> None:
        file = tmp_path / "last.pth"
        save_checkpoint({"w": torch.zeros(10)}, file)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (1 << 12, 1 << 16, 1 << 18):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                with pytest.raises(OSError, match="bytes are free") as caught:
                    save_checkpoint({"w": torch.randn(1 << 17)}, file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG and caught.value.filename == str(file)
            assert torch.equal(load_checkpoint_file(file)["w"], torch.zeros(10))
            assert os.listdir(tmp_path) == ["last.pth"]

    def test_too_little_room_is_seen_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "last.pth"
        save_checkpoint({"w": torch.zeros(1000)}, file)
        usage = shutil.disk_usage(tmp_path)
        size = file.stat().st_size
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
        with pytest.raises(OSError, match=f"{size} bytes are free") as caught:
            save_checkpoint({"w": torch.ones(1000)}, file)
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
        assert torch.equal(load_checkpoint_file(file)["w"], torch.zeros(1000))

    def test_what_could_not_be_read_back_is_not_written(self, tmp_path: Path) -> None:
        file = tmp_path / "last.pth"
        save_checkpoint({"epoch": 1, "best": np.float64(3.5)}, file)
        with pytest.raises(TypeError, match="argparse.Namespace"):
            save_checkpoint({"epoch": 2, "args": argparse.Namespace()}, file)
        assert load_checkpoint_file(file) == {"epoch": 1, "best": 3.5}
        assert os.listdir(tmp_path) == ["last.pth"]

    def test_an_unpicklable_object_keeps_the_old_file(self, tmp_path: Path) -> None:
        file = tmp_path / "last.pth"
        save_checkpoint({"epoch": 1}, file)
        with pytest.raises((AttributeError, TypeError, ValueError)):
            save_checkpoint({"epoch": 2, "f": lambda: None}, file)
        assert load_checkpoint_file(file) == {"epoch": 1}
        assert os.listdir(tmp_path) == ["last.pth"]

    def test_killed_while_saving(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys, time, torch\n"
            "from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint\n"
            "torch.set_num_threads(1)\n"
            "def save(n): save_checkpoint({'w': torch.full((500_000,), float(n)), 'n': n}, sys.argv[1])\n"
            "save(-1)\n"
            "for attempt in range(12):\n"
            "    child = os.fork()\n"
            "    while child == 0: save(attempt)\n"
            "    time.sleep(0.005 + 0.007 * attempt)\n"
            "    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)\n"
            "    found = load_checkpoint_file(sys.argv[1])\n"
            "    print(found['n'], bool((found['w'] == found['n']).all()))\n"
        )
        path = tmp_path / "last.pth"
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        found = [line.split() for line in done.stdout.splitlines()]
        assert len(found) == 12 and all(whole == "True" for _, whole in found)
        assert int(found[-1][0]) >= 0  # saves had completed between the kills


class TestFindStateDict:
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"model": state, "epoch": 17},
            lambda state: {"state_dict": state, "epoch": 17},
            lambda state: {"model": {"state_dict": state, "iteration": 0}, "epoch": 17},
            lambda state: {"state_dict": {"model": state}},
            lambda state: collections.OrderedDict(state),
        ],
    )
    def test_every_nesting(self, wrap: Callable[[Any], Any], prefix: str) -> None:
        state, rest = find_state_dict(wrap({prefix + name: value for name, value in self.weights.items()}))
        assert_equal(state, self.weights)
        assert rest.get("epoch", 17) == 17 and set(rest) <= {"epoch", "iteration"}

    def test_entries_beside_bare_weights_are_kept_apart(self) -> None:
        state, rest = find_state_dict({**self.weights, "epoch": 3})
        assert_equal(state, self.weights)
        assert rest == {"epoch": 3}

    def test_a_prefix_of_some_keys_stays(self) -> None:
        state, _ = find_state_dict({"module.a": torch.ones(1), "b": torch.ones(1)})
        assert list(state) == ["module.a", "b"]

    @pytest.mark.parametrize("container", ["model", "state_dict", "model_state_dict", "net"])
    def test_names_of_containers(self, container: str) -> None:
        state, rest = find_state_dict({container: {"a": torch.ones(1)}, "epoch": 3})
        assert list(state) == ["a"] and rest == {"epoch": 3}

    def test_compiled_parts_of_a_model(self) -> None:
        state, _ = find_state_dict({"encoder._orig_mod.weight": torch.ones(1), "head.bias": torch.ones(1)})
        assert list(state) == ["encoder.weight", "head.bias"]

    @pytest.mark.parametrize("obj", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(1)], None, {0: torch.ones(1)}])
    def test_no_weights(self, obj: Any) -> None:
        with pytest.raises(CheckpointError, match="best.pth"):
            find_state_dict(obj, source="best.pth")


class TestStrictLoading:
    @pytest.fixture
    def model(self) -> nn.Module:
        return nn.Sequential(collections.OrderedDict(body=nn.Linear(3, 2), classifier=nn.Linear(2, 4)))

    def test_everything_fits(self, model: nn.Module) -> None:
        state = {name: torch.randn_like(value).half() for name, value in model.state_dict().items()}
        assert load_state_dict_strictly(model, state, source="a.pth") == []
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, state[name].float())

    def test_one_sentence_names_all_disagreements_and_nothing_changes(self, model: nn.Module) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = {name: torch.zeros_like(value) for name, value in before.items()}
        del state["body.bias"]
        state["classifier.weight"] = torch.zeros(7, 2)
        state["body.weight"] = torch.zeros(2, 3, dtype=torch.int64)
        state |= {f"extra.{number}": torch.zeros(1) for number in range(7)}
        with pytest.raises(CheckpointError) as caught:
            load_state_dict_strictly(model, state, source="runs/best.pth")
        message = str(caught.value)
        assert "runs/best.pth" in message and "\n" not in message
        assert "missing: body.bias;" in message
        assert "extra.4 and 2 more" in message and "extra.5" not in message
        assert "classifier.weight [7, 2] instead of [4, 2]" in message
        assert "body.weight [2, 3] int64 instead of [2, 3]" in message
        assert_equal(dict(model.state_dict()), before)

    def test_liberties_are_granted_by_name_and_reported(self, model: nn.Module) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = {name: torch.zeros_like(value) for name, value in before.items()}
        del state["classifier.bias"]
        state["classifier.weight"] = torch.zeros(7, 2)

        def in_head(name: str) -> bool:
            return name.startswith("classifier.")

        said = load_state_dict_strictly(
            model, state, source="a.pth", may_be_missing=in_head, skip_shape_mismatch=in_head
        )
        assert len(said) == 2 and "classifier.bias" in said[0] and "classifier.weight" in said[1]
        after = model.state_dict()
        assert torch.equal(after["body.weight"], torch.zeros(2, 3))
        assert torch.equal(after["classifier.weight"], before["classifier.weight"])
        assert torch.equal(after["classifier.bias"], before["classifier.bias"])

    def test_an_unexpected_key_is_no_liberty(self, model: nn.Module) -> None:
        with pytest.raises(CheckpointError, match="unexpected: other"):
            load_state_dict_strictly(
                model,
                {**model.state_dict(), "other": torch.ones(1)},
                source="a.pth",
                may_be_missing=lambda _: True,
                skip_shape_mismatch=lambda _: True,
            )

    def test_a_sparse_tensor_is_a_disagreement(self, model: nn.Module) -> None:
        state = dict(model.state_dict())
        state["body.weight"] = torch.zeros(2, 3).to_sparse()
        with pytest.raises(CheckpointError, match="body.weight"):
            load_state_dict_strictly(model, state, source="a.pth")


class TestFingerprint:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64), "e": torch.zeros(0, 2)}
    settings = {"size": (384, 128), "attention": "batch"}

    def test_the_value_is_fixed(self) -> None:
        expected = "729c877068f8355fadf387ba3579b9b03bfcfef9b7ddef1e6c110125854fdeab"
        assert fingerprint(self.state, self.settings) == expected

    def test_order_layout_and_container_do_not_matter(self) -> None:
        other = {name: self.state[name] for name in reversed(self.state)}
        other["a"] = self.state["a"].t().contiguous().t()
        settings = {"attention": "batch", "size": [384, 128]}
        assert fingerprint(other, settings) == fingerprint(self.state, self.settings)

    @pytest.mark.parametrize(
        "change",
        [
            {"a": torch.arange(6.0).reshape(3, 2)},
            {"a": torch.arange(6.0).reshape(2, 3).half()},
            {"a": torch.arange(6.0).reshape(2, 3) + 1e-6},
            {"b": torch.tensor(2, dtype=torch.int64)},
            {"c": torch.zeros(0, 2)},
        ],
    )
    def test_every_change_of_the_weights_matters(self, change: dict[str, torch.Tensor]) -> None:
        assert fingerprint({**self.state, **change}, self.settings) != fingerprint(self.state, self.settings)

    def test_settings_matter(self) -> None:
        changed = {**self.settings, "attention": "parts"}
        assert fingerprint(self.state, changed) != fingerprint(self.state, self.settings)

    def test_half_and_bfloat16_can_be_hashed(self) -> None:
        halves = {name: torch.ones(3, dtype=dtype) for name, dtype in (("h", torch.float16), ("b", torch.bfloat16))}
        assert len(fingerprint(halves, {})) == 64


def test_a_folder_with_a_lora_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds only a LoRA adapter"):
        load_checkpoint_file(tmp_path)
