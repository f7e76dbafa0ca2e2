"""The shipped configurations and the checks of one's own."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mra.config import check_config, config_path, load_config, with_overrides, write_config
from mra.model.settings import PACKAGE, find_shipped
from tbps_common.datasets.sda import SHARDS
from tbps_common.errors import InputError

TASKS = ("sda", "cuhk", "icfg", "rstp")

# Specification, section 4.1; one column per task, "-" where the key is absent.
TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    "image_root": ("images/SDA", "images/CUHK-PEDES/imgs", "images/ICFG-PEDES", "images/RSTPReid"),
    "image_root_test": ("images/CUHK-PEDES/imgs", "-", "-", "-"),
    "train_file": ("-", *(["data/finetune/" + task + "_train.json"] for task in TASKS[1:])),
    "train_file_regions": ([f"data/sda/{shard}" for shard in SHARDS], "-", "-", "-"),
    "val_file": ("data/finetune/cuhk_val.json", "data/finetune/cuhk_val.json", "-", "data/finetune/rstp_val.json"),
    "test_file": tuple(f"data/finetune/{name}_test.json" for name in ("cuhk", "cuhk", "icfg", "rstp")),
    "region": (0.8, 0, 0, 0),
    "vision_config": ("configs/config_swinB_224x224.json", *["configs/config_swinB_384x256.json"] * 3),
    "window_size": ("-", 8, 8, 8),
    "patch_size": (32,) * 4,
    "image_res": (224, 384, 384, 384),
    "h": (224, 384, 384, 384),
    "w": (224, 256, 256, 256),
    "text_config": ("configs/config_bert.json",) * 4,
    "text_encoder": ("data/bert-base-uncased",) * 4,
    "load_pretrained": (False, True, True, True),
    "load_params": (True, False, False, False),
    "lr_2": (False, True, True, True),
    "init_cross": (True, "-", "-", "-"),
    "embed_dim": (2048, 2048, 2048, 256),
    "itc_dop": (0.5, 0.5, 0.5, "-"),
    "LabelSmooth": (0, 0.2, 0.2, 0.2),
    "temp": (0.07,) * 4,
    "max_tokens": (56,) * 4,
    "max_words": (56,) * 4,
    "icfg_rstp": (False, False, True, True),
    "eda": (False, True, True, True),
    "erasing_p": (0.6, 0.6, 0.6, 0.4),
    "mask_prob": (0.25,) * 4,
    "max_masks": (10,) * 4,
    "skipgram_prb": (0.2,) * 4,
    "skipgram_size": (3,) * 4,
    "mask_whole_word": (True,) * 4,
    "batch_size_train": (40,) * 4,
    "batch_size_test": (40,) * 4,
    "batch_size_test_text": (200,) * 4,
    "k_test": (128, 512, 512, 1000),
    "test_hflip": ("-", True, True, True),
    "optimizer": tuple(
        {"opt": "adamW", "lr": lr, "weight_decay": 0.01, "lr_mult": 2, "lr_x": 2} for lr in (5e-5, 1e-4, 1e-4, 6e-5)
    ),
    "schedular": (
        {"sched": "linear", "lr": 5e-5, "epochs": 32, "num_warmup_steps": 2600},
        *(
            {"sched": "step", "lr": lr, "epochs": epochs, "num_warmup_steps": 0.1}
            for lr, epochs in ((1e-4, 30), (1e-4, 30), (6e-5, 10))
        ),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_shipped_values_are_the_released_ones(task: str) -> None:
    config = load_config(PACKAGE / config_path(task))
    expected = {key: row[TASKS.index(task)] for key, row in TABLE.items() if row[TASKS.index(task)] != "-"}
    assert {key: value for key, value in config.items() if key != "project"} == expected
    assert isinstance(config["project"], str)
    assert isinstance(config["optimizer"]["lr"], float)
    check_config(config, task, training=True)


def test_shipped_sizes_are_the_released_ones() -> None:
    small, large = (
        json.loads((PACKAGE / "configs" / name).read_text(encoding="utf-8"))
        for name in ("config_swinB_224x224.json", "config_swinB_384x256.json")
    )
    keys = ["ckpt", "vision_width", "image_res", "h", "w", "window_size", "embed_dim", "depths", "num_heads"]
    assert list(small) == list(large) == [*keys, "drop_rate", "drop_path_rate"]
    ckpt, depths, heads = "data/swin_base_patch4_window7_224_22k.pth", [2, 2, 18, 2], [4, 8, 16, 32]
    assert list(small.values()) == [ckpt, 1024, 224, 224, 224, 7, 128, depths, heads, 0.1, 0.2]
    assert list(large.values()) == [ckpt, 1024, 384, 384, 256, 8, 128, depths, heads, 0, 0.1]
    text = json.loads((PACKAGE / "configs" / "config_bert.json").read_text(encoding="utf-8"))
    wanted = {
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        **{"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        **{"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522},
        **{"pad_token_id": 0, "initializer_range": 0.02, "fusion_layer": 6, "encoder_width": 1024},
    }
    assert {key: text[key] for key in wanted} == wanted


def test_own_configs_folder_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/cuhk.yaml") == PACKAGE / "configs" / "cuhk.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cuhk.yaml").write_text("embed_dim: 5\n", encoding="utf-8")
    assert load_config("configs/cuhk.yaml") == {"embed_dim": 5}
    assert load_config("configs/icfg.yaml")["embed_dim"] == 2048
    assert find_shipped("elsewhere/cuhk.yaml") == Path("elsewhere/cuhk.yaml")


def test_numbers_without_a_dot_are_numbers_and_survive_writing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-4\nb: 5E-05\nc: 3\nd: on\ne: [1, 2]\nf: 0o17\n", encoding="utf-8")
    config = load_config(tmp_path / "a.yaml")
    assert config == {"a": 1e-4, "b": 5e-5, "c": 3, "d": "on", "e": [1, 2], "f": 15}
    write_config(tmp_path / "b.yaml", config)
    assert load_config(tmp_path / "b.yaml") == config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "empty"),
        ("- 1\n- 2\n", "list"),
        ("just words", "str"),
        ("a: 1\na: 2\n", "line 2"),
        ("a: [1, 2", "line"),
        ("a: !!python/object/apply:os.system ['true']\n", "a.yaml"),
        ("a: &x [*x]\n", "a.yaml"),
        ("\x00", "a.yaml"),
        ("[" * 100_000, "a.yaml"),
    ],
)
def test_file_that_is_no_configuration_is_named(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content, encoding="utf-8")
    if content.startswith("a: &x"):  # YAML allows it; a list within itself is no file name
        with pytest.raises(InputError, match="has no key"):
            check_config(load_config(tmp_path / "a.yaml"), tmp_path / "a.yaml", training=True)
        return
    with pytest.raises(InputError, match=told):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_root", 3),
        ("test_file", None),
        ("train_file", "data/finetune/cuhk_train.json"),
        ("train_file", []),
        ("train_file", [{"image_root": "images"}]),
        ("train_file", [{"file": "a.json", "own_ids": "yes"}]),
        ("patch_size", 0),
        ("patch_size", 16),
        ("h", 383),
        ("w", 224),
        ("max_tokens", 2),
        ("max_tokens", 600),
        ("k_test", "many"),
        ("batch_size_train", 1),
        ("batch_size_test", True),
        ("temp", 0),
        ("erasing_p", float("nan")),
        ("eda", "yes"),
        ("LabelSmooth", 1),
        ("embed_dim", 2.5),
        ("region", 0.8),
        ("region_feat", "better"),
        ("vision_config", "configs/nothing.json"),
        ("optimizer", "adamW"),
        ("optimizer.lr", "1e-4"),
        ("schedular.sched", "cosine"),
        ("schedular.epochs", 0),
        ("schedular.num_warmup_steps", -1),
    ],
)
def test_value_that_cannot_work_is_named(key: str, value: Any) -> None:
    config = load_config(PACKAGE / "configs" / "cuhk.yaml")
    *groups, last = key.split(".")
    (config[groups[0]] if groups else config)[last] = value
    with pytest.raises(InputError, match=str(value) if key == "vision_config" else last):
        check_config(config, "own.yaml", training=True)


def test_training_file_may_have_images_and_people_of_its_own() -> None:
    config = load_config(PACKAGE / "configs" / "cuhk.yaml")
    config["train_file"] += [{"file": "own.json", "image_root": "images/own", "own_ids": True}]
    check_config(config, "own.yaml", training=True)


def test_flags_override_the_file() -> None:
    config = load_config(PACKAGE / "configs" / "sda.yaml")
    none = argparse.Namespace(bs=0, epo=0, lr=0.0, region=0.0, region_feat=None, gradient_checkpointing=False)
    before = copy.deepcopy(config)
    assert with_overrides(config, none) == before
    changed = with_overrides(
        config, argparse.Namespace(bs=3, epo=2, lr=1e-3, region=0.1, region_feat="paper", gradient_checkpointing=True)
    )
    assert config == before
    assert changed["batch_size_train"] == 3 and changed["schedular"]["epochs"] == 2
    assert changed["optimizer"]["lr"] == changed["schedular"]["lr"] == 1e-3
    assert changed["region"] == 0.1 and changed["region_feat"] == "paper" and changed["gradient_checkpointing"]
