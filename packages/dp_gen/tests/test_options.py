"""The flags of train.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_gen import load_tokenizer, parse_args
from dp_gen.cli import train_main
from dp_gen.model.hub import resolve_model
from dp_gen.options import TRAIN_DESCRIPTION, attribute_types
from tbps_common.errors import InputError


def test_the_readme_command_parses(helpers: Any) -> None:
    args = parse_args([*helpers.README_FLAGS, "--dataset_name", "d", "--logging_dir", "l", "--output_dir", "o"])
    assert args.max_train_steps == 30000 and args.lr == 1e-5 and args.loc_layers == 5 and args.mixed_precision == "bf16"
    assert args.mask_loss and args.attribute_loc and args.keep_only_last_checkpoint and args.keep_interval == 10000
    assert attribute_types(args) == {"hair", "uppercloth", "bottomcloth"}


def test_the_help_shows_the_readme_command(helpers: Any) -> None:
    words = re.sub(r"\\\n", " ", TRAIN_DESCRIPTION).split()
    for flag in (word for word in helpers.README_FLAGS if word.startswith("--")):
        assert flag in words, flag


def test_defaults_are_the_authors() -> None:
    args = parse_args(default=True)
    assert vars(args) == vars(parse_args([]))
    released = {
        "pretrained_model_hf": "runwayml/stable-diffusion-v1-5",
        "output_dir": "log/fine_generator",
        "logging_dir": "logs",
        "report_to": None,
        "train_batch_size": 16,
        "num_train_epochs": 100,
        "max_train_steps": None,
        "lr": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 500,
        "checkpointing_steps": 500,
        "MAX_REFERENCE_ATTRIBUTE_NUM": 4,
        "resolution": 128,
        "attribute_loc_weight": 0.01,
        "loc_layers": 5,
        "unet_lr_scale": 1.0,
        "start_merge_step": 0,
        "guidance_scale": 5.0,
        "mask_loss_prob": 0.73,
        "adam_weight_decay": 1e-2,
        "uncondition_prob": 0.0,
        "attribute_appear_prob": 1.0,
    }
    assert {name: getattr(args, name) for name in released} == released
    assert attribute_types(args) is None


def test_aliases() -> None:
    assert parse_args(["--loc_latyers", "3"]).loc_layers == parse_args(["--loc_layers", "3"]).loc_layers == 3
    assert (
        parse_args(["--freeze_controller"]).activate_controller
        and parse_args(["--activate_controller"]).activate_controller
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--img_token_num", "2"],
        ["--resolution", "100"],
        ["--resolution", "32"],
        ["--text_image_linking", "concat"],
        ["--loc_layers", "8"],
        ["--attribute_localization_loss", "l2"],
        ["--lr", "nan"],
        ["--seed", "4294967296"],
        ["--mask_loss_prob", "1.5"],
        ["--train_batch_size", "0"],
        ["--mixed_precision", "int8"],
        ["--lr_scheduler", "step"],
        ["--no_such_flag"],
        ["--max_train", "3"],
    ],
)
def test_unusable_values_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_sentences_before_anything_is_loaded(
    tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    for more, said in (
        (["--dataset_name", ""], "--dataset_name is missing"),
        (["--dataset_name", str(tmp_path / "no")], "is not a folder"),
        (["--uncondition_prob", "0.6", "--text_only_prob", "0.6"], "together exceed 1"),
        (["--output_dir", str(file)], "is a file"),
        (["--pretrained_model_hf", str(tmp_path)], "is missing scheduler, tokenizer"),
        (["--image_encoder_hf", str(tmp_path)], "has no config.json"),
        (["--load_model", str(tmp_path / "gone")], "does not exist"),
    ):
        assert train_main(train_flags(tmp_path / "out", *more)) == 2
        shown = capsys.readouterr().err
        assert said in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "out").exists()


def test_the_moved_model_is_found_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, successor = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    monkeypatch.chdir(tmp_path)

    def look() -> str:
        return resolve_model(
            name, marker="model_index.json", flag="--pretrained_model_hf", cache_dir=str(tmp_path / "c")
        )

    with pytest.raises(InputError, match=f"{name} nor {successor}.*--pretrained_model_hf"):
        look()  # offline, and nothing in the cache
    commit = "0" * 40
    for repository in (successor, name):  # the cache of the hub, as its library lays it out
        entry = tmp_path / "c" / f"models--{repository.replace('/', '--')}"
        (entry / "snapshots" / commit).mkdir(parents=True)
        (entry / "snapshots" / commit / "model_index.json").write_text("{}", encoding="utf-8")
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(commit, encoding="utf-8")
        assert look() == repository
        assert (successor in capsys.readouterr().out) == (repository == successor)
    (tmp_path / name).mkdir(parents=True)
    assert look() == name  # a folder of that name comes first
    with pytest.raises(InputError, match="is neither a folder nor the name of a model"):
        resolve_model("a/b/c", marker="x", flag="--image_encoder_hf")


def test_the_tokenizer_is_looked_up_at_its_revision(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds that revision alone is enough."""
    asked = {}

    def resolve(name: str, **flags: Any) -> str:
        asked.update(flags)
        return str(tiny_models / "runwayml" / "stable-diffusion-v1-5")

    monkeypatch.setattr("dp_gen.model.captions.resolve_model", resolve)
    load_tokenizer("some/model", "fp16")
    assert asked["revision"] == "fp16"


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("vocab.json", "merges.txt")])
def test_an_incomplete_tokenizer_is_no_tokenizer(kept: tuple[str, ...], tiny_models: Path, tmp_path: Path) -> None:
    """Of what is absent, transformers makes a tokenizer that knows no word, without an error."""
    (tmp_path / "tokenizer").mkdir()
    for name in kept:
        source = tiny_models / "runwayml" / "stable-diffusion-v1-5" / "tokenizer" / name
        (tmp_path / "tokenizer" / name).write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="vocab.json"):
        load_tokenizer(str(tmp_path))
