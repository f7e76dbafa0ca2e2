"""Model settings: built-ins, YAML files, checks, and the copy a run keeps."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fafa.model.settings import BACKBONES, ModelSettings, read_model_config, read_settings, write_model_config
from tbps_common.errors import InputError

MINIMAL = {"image_size": 224, "num_query_token": 32}


def test_builtin_backbones_are_the_papers() -> None:
    assert tuple(BACKBONES) == ("pretrain", "pretrain_vitL", "coco")
    large = read_settings("pretrain")
    assert (large.vit_model, large.vit_width, large.vit_depth, large.image_size) == ("eva_clip_g", 1408, 39, 224)
    assert large.freeze_vit and large.vit_precision == "fp16" and large.vit_weights.endswith("eva_vit_g.pth")
    assert large.pretrained.endswith("/blip2_pretrained.pth") and large.qformer.init_from == "bert-base-uncased"
    clip = read_settings("pretrain_vitL")
    assert (clip.vit_width, clip.vit_depth, clip.vit_heads, clip.vit_mlp_ratio) == (1024, 23, 16, 4.0)
    assert clip.vit_weights.endswith("clip_vit_L.pth")
    coco = read_settings("coco")
    assert coco.image_size == 364 and coco.load_finetuned and not coco.freeze_vit and coco.use_grad_checkpoint
    assert coco.finetuned.endswith("/blip2_finetune_coco.pth") and coco.vit_precision == "fp32"


def test_other_sizes_have_no_default_start_weights() -> None:
    own = ModelSettings.from_mapping({**MINIMAL, "vit_depth": 3, "qformer": {"num_hidden_layers": 2}})
    assert own.vit_weights is None and own.qformer.init_from is None
    smaller_image = ModelSettings.from_mapping({**MINIMAL, "image_size": 112, "qformer": {"hidden_dropout_prob": 0}})
    assert smaller_image.vit_weights and smaller_image.qformer.init_from


def test_the_complete_mapping_means_the_same() -> None:
    for mapping in (MINIMAL, {**MINIMAL, "vit_depth": 3, "qformer": {"num_hidden_layers": 2}}, BACKBONES["coco"]):
        settings = ModelSettings.from_mapping(mapping)
        assert ModelSettings.from_mapping(settings.to_mapping()) == settings


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_size": None}, "image_size"),
        ({"vit_model": "resnet"}, "vit_model"),
        ({"image_size": 225}, "patch_size"),
        ({"vit_heads": 7}, "vit_heads"),
        ({"num_query_token": 0}, "num_query_token"),
        ({"num_query_token": True}, "num_query_token"),
        ({"fda_k": "six"}, "fda_k"),
        ({"freeze_vit": "yes, please"}, "freeze_vit"),
        ({"dsu_p": 1.5}, "dsu_p"),
        ({"max_txt_len": 600}, "max_txt_len"),
        ({"qformer": [1]}, "qformer"),
        ({"qformer": {"num_attention_heads": 5}}, "num_attention_heads"),
        ({"vit_model": "clip_L", "drop_path_rate": 0.1}, "drop_path_rate"),
    ],
)
def test_impossible_settings_are_one_sentence(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        ModelSettings.from_mapping({**MINIMAL, **change}, "model.yaml")
    assert str(caught.value).startswith("model.yaml") and "\n" not in str(caught.value)


def test_a_misspelt_key_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fafa.model"):
        assert ModelSettings.from_mapping({**MINIMAL, "vit_widht": 8}).vit_width == 1408
    assert "vit_widht" in caplog.text and "vit_width" in caplog.text


def test_yaml_paths_are_found_beside_the_file(tmp_path: Path, vocabulary: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "words.txt").write_bytes(vocabulary.read_bytes())
    (folder / "start.pth").touch()
    content = {"model": {**MINIMAL, "tokenizer": "words.txt", "pretrained": "start.pth", "finetuned": "hf:some/name"}}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    mapping = read_model_config(file, num_query_token=8, fda_k=None)
    assert mapping["tokenizer"] == str(folder / "words.txt") and mapping["pretrained"] == str(folder / "start.pth")
    assert mapping["finetuned"] == "hf:some/name" and mapping["num_query_token"] == 8 and mapping["fda_k"] == 6


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("model: {image_size: 28, num_query_token: 4, qformer: {layer_norm_eps: 1e-12}}", encoding="utf-8")
    assert read_settings(file).qformer.layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    "content",
    [b"", b"model: 3", b"[1, 2]", b"model: {a: [}", b"\xff\xfe\x00", b"other: {}", b"!!python/object:os.x {}"],
)
def test_files_that_are_no_model_are_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match="broken.yaml"):
        read_settings(file)


def test_an_unknown_backbone_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="pretrain_vitL"):
        read_settings("pretrian")


def test_a_runs_copy_works_without_the_original(
    tmp_path: Path, tiny_mapping: Callable[..., dict[str, Any]], vocabulary: Path
) -> None:
    path = write_model_config(tiny_mapping(load_pretrained=True, pretrained="/gone.pth", vit_weights="/gone"), tmp_path)
    assert path == tmp_path / "model_config.yaml"
    assert (tmp_path / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    settings = read_settings(path)
    assert settings.tokenizer == str(tmp_path / "vocab.txt") and settings.vit_width == 24
    assert not settings.load_pretrained and not settings.load_finetuned
    assert settings.vit_weights is None and settings.qformer.init_from is None


def test_a_hub_tokenizer_keeps_its_name(tmp_path: Path) -> None:
    path = write_model_config(read_model_config("pretrain"), tmp_path)
    assert read_settings(path).tokenizer == "bert-base-uncased" and not (tmp_path / "vocab.txt").exists()


def test_settings_need_no_torch() -> None:
    program = (
        "import sys, fafa\nfrom fafa.model.settings import read_model_config\nread_model_config('pretrain')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
