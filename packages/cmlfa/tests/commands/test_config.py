"""configs.yaml: files of the released code are read, files of this code are plain, anything else is told in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cmlfa.config import changed_flags, load_train_configs, save_train_configs
from cmlfa.options import get_args
from tbps_common.errors import InputError


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.golden("cmlfa", kind="config")
def test_official_file_is_read_as_stored_and_completed(golden: Any, golden_name: str) -> None:
    stored = golden(golden_name)
    config = load_train_configs(stored.folder / stored.case["file"])
    assert {name: plain(config[name]) for name in stored.case["expected"]} == stored.case["expected"]
    assert config.img_size == (384, 128)
    assert config.lfa_attention == "batch"
    assert config.clean_captions is False
    assert config.itc_loss_weight == 5.0


def test_what_is_saved_is_read_back_and_needs_no_tag(tmp_path: Path) -> None:
    args = get_args(
        ["--img_size", "256,96", "--lr", "1e-3", "--milestones", "3", "9", "--name", "été", "--trust_checkpoint"]
    )
    path = save_train_configs(tmp_path, args)
    text = path.read_text(encoding="utf-8")
    stored = yaml.safe_load(text)
    assert path == tmp_path / "configs.yaml"
    assert "!!" not in text
    assert list(stored) == sorted(stored)
    config = load_train_configs(path)
    assert {name: plain(config[name]) for name in vars(args) if name != "trust_checkpoint"} == {
        name: plain(value) for name, value in vars(args).items() if name != "trust_checkpoint"
    }
    assert config.trust_checkpoint is False  # never taken over from a file
    assert not changed_flags(config, vars(args))


def test_changed_flags_are_told_apart() -> None:
    before, now = vars(get_args([])), vars(get_args(["--lr", "1e-3", "--resume", "--output_dir", "elsewhere"]))
    assert changed_flags(before, now) == {"lr": (1e-5, 1e-3)}


def test_unknown_keys_are_kept_and_attributes_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    path.write_text("distributed: false\nlr: 1e-3\n", encoding="utf-8")
    config = load_train_configs(path)
    assert config.distributed is False
    assert config.lr == 1e-3
    config.batch_size = 3
    assert config["batch_size"] == 3
    assert not hasattr(config, "no_such_flag")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just words",
        "lr: [1, 2",
        "a: b: c",
        "\tlr: 1",
        "lr: fast",
        "batch_size: many",
        "batch_size: 0",
        "batch_size: 3.5",
        "batch_size: null",
        "img_size: 384",
        "img_size: [384]",
        "img_size: [a, b]",
        "milestones: 20",
        "MLM: maybe",
        "dataset_name: MNIST",
        "optimizer: RMSprop",
        "lfa_attention: heads",
        "loss_names: 7",
        "precision: [fp16]",
        "img_size: !!python/object/apply:os.system ['touch hacked']",
        "img_size: !!python/object/new:tuple [[1, 2]]",
        "x: !!python/name:os.system",
        "img_size: !!python/tuple {a: 1}",
        "&a [*a]",
        "x: *missing",
        "lr: 1\n--- \nlr: 2\n",
        "[" * 5000,
        "lr: \x00",
    ],
)
def test_unusable_file_is_told_in_one_sentence_that_names_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_train_configs(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["configs.yaml"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00lr", b"lr: \x80\x81"], ids=["utf-16", "not utf-8"])
def test_other_encodings_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match="configs.yaml"):
        load_train_configs(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_train_configs(tmp_path / "configs.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_train_configs(tmp_path)
