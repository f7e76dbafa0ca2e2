"""What train.py says to flags, paths and data that cannot be used: one line, status 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diana.cli import train_main
from diana.options import parse_train_flags
from diana.trainer_flags import modernise, take_flag

Flags = Callable[..., list[str]]


def refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command answers with."""
    assert train_main(flags) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vision_pretrained", "<Swin Transformer Root>/x"], "set VISION_PRETRAINED"),
        (["--vision_pretrained", "no/such/folder"], "--vision_pretrained no/such/folder is not a folder"),
        (["--llama_pretrained", "./nothing"], "set LLAMA_PRETRAINED"),
        (["--pretrained", "work_dirs/pretrain_is_not_here"], "run shell/pretrain.sh first"),
        (["--config_dir", "no/configs/here"], "--config_dir no/configs/here"),
        (["--dataset_config_path", "absent.yaml"], "absent.yaml"),
        (["--split", "val"], "it has: train"),
        (["--deepspeed", "absent.json"], "--deepspeed absent.json does not exist"),
        (["--output_dir", __file__], "is a file"),
        (["--output_dir", ""], "--output_dir is missing"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere does not exist"),
        (["--resume_from_checkpoint", "True"], "no checkpoint to resume from"),
        (["--no_such_flag", "1"], "unknown flags: --no_such_flag 1"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--save_strategy", "sometimes"], "sometimes"),
        (["--freeze_model", "True"], "nothing is left to train"),
        (
            ["--label_smoothing_factor", "0.1"],
            "--label_smoothing_factor cannot be used here (the losses are DiaNA's own)",
        ),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha cannot be used here"),
        (
            ["--eval_strategy", "steps", "--eval_steps", "2"],
            "--eval_strategy cannot be used here (training does not evaluate",
        ),
        (["--do_eval", "True"], "--do_eval cannot be used here"),
        (["--auto_find_batch_size", "True"], "--auto_find_batch_size cannot be used here"),
        (["--accelerator_config", '{"split_batches": true}'], "--accelerator_config cannot be used here"),
        (["--fsdp", "full_shard auto_wrap"], "--fsdp"),
        (["--llama_pretrained", ""], "--llama_pretrained is missing"),
    ],
)
def test_flags(
    more: list[str],
    message: str,
    data_root: Path,
    train_flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*train_flags("pretrain", tmp_path / "out"), *more]
    try:
        assert message in refused(flags, capsys)
    except SystemExit as stop:  # argparse answered
        assert stop.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--num_query", "0"],
        ["--sim_type", "median"],
        ["--mask_probability", "1.5"],
        ["--enable_refiner", "maybe"],
        ["--force_image_size", "1", "2", "3"],
        ["--dataset_name", "flickr30k"],
        ["--version", "v0"],
        ["--turn_limit", "0"],
    ],
)
def test_the_parser_names_the_flag(
    more: list[str], data_root: Path, train_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main([*train_flags("pretrain", tmp_path / "out"), *more])
    assert stop.value.code == 2
    assert more[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_reid.json", None, "train_reid.json of chatpedes does not exist"),
        ("train_reid.json", "", "train_reid.json"),
        ("train_reid.json", "[{", "line 1"),
        ("train_reid.json", '{"a": 1}', "list of objects"),
        ("train_reid.json", '[{"id": 1, "file_path": "../../x.png", "chats": []}]', "file_path"),
        (
            "train_reid.json",
            '[{"id": 1, "file_path": "a.png", "chats": [[{"from": "user", "value": "x"}]]}]',
            "record 0",
        ),
        ("imgs", None, "image folder"),
    ],
)
def test_data(
    file: str,
    content: str | None,
    message: str,
    world: Path,
    pretrained: Path,
    train_flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(world / "ChatPedes", tmp_path / "ChatPedes")
    target = tmp_path / "ChatPedes" / file
    if content is not None:
        target.write_text(content, encoding="utf-8")
    elif target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    monkeypatch.setenv("DIANA_DATA_ROOT", str(tmp_path))
    flags = train_flags("finetune", tmp_path / "out", "--pretrained", str(pretrained))
    said = refused(flags, capsys)
    assert message in said
    assert "ChatPedes" in said
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_images_are_named(
    world: Path,
    pretrained: Path,
    train_flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(world / "ChatPedes", tmp_path / "ChatPedes")
    monkeypatch.setenv("DIANA_DATA_ROOT", str(tmp_path))
    records = json.loads((tmp_path / "ChatPedes" / "train_reid.json").read_text(encoding="utf-8"))
    image = tmp_path / "ChatPedes" / "imgs" / records[0]["file_path"]
    image.write_bytes(b"no picture")
    flags = train_flags("finetune", tmp_path / "out", "--pretrained", str(pretrained))
    assert str(image) in refused([*flags, "--max_steps", "50"], capsys)
    assert (
        train_main([*flags, "--num_train_epochs", "1", "--bad_images", "skip", "--overwrite_output_dir", "True"]) == 0
    )
    shown = capsys.readouterr().out
    assert shown.count("the next item takes their place") == 1 and str(image) in shown
    image.unlink()
    said = refused([*flags, "--output_dir", str(tmp_path / "other")], capsys)
    assert str(image) in said
    assert "1 images" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_start_model_is_named(
    damage: str,
    data_root: Path,
    pretrained: Path,
    train_flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = tmp_path / "start"
    shutil.copytree(pretrained, start, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = start / "model.safetensors"
    content = weights.read_bytes()
    if damage == "other":
        from safetensors.torch import load_file, save_file

        save_file({f"other.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    else:
        weights.write_bytes(content[:1000] if damage == "cut" else b"")
    flags = train_flags("finetune", tmp_path / "out", "--pretrained", str(start))
    assert str(start) in refused(flags, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        ('{"scheduler": {"type": "OneCycle"}}', "only WarmupDecayLR"),
        ('{"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_type": "cubic"}}}', "log or linear"),
        ('{"gradient_clipping": -1}', "gradient_clipping"),
    ],
)
def test_deepspeed_files(
    content: str,
    message: str,
    data_root: Path,
    train_flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content, encoding="utf-8")
    assert message in refused([*train_flags("pretrain", tmp_path / "out"), "--deepspeed", str(path)], capsys)


@pytest.mark.parametrize("content", ["{", "[1]", None])
def test_a_json_file_of_flags(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flags.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert str(path) in refused([str(path)], capsys)


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (["--use_cpu"], "cpu"),
        (["--no_cuda", "True"], "cpu"),
        (["--use_cpu=True", "--seed", "1"], "cpu"),
        (["--no_cuda", "False"], "auto"),
        ([], "auto"),
    ],
)
def test_the_trainers_flag_for_the_cpu_counts_devices_too(words: list[str], device: str) -> None:
    """The launcher starts no process per GPU, and DeepSpeed is not used."""
    args, _ = parse_train_flags(["--dataset_name", "mals", "--version", "customized", *words])
    assert args.device == device


def test_flags_are_translated_and_taken_out() -> None:
    words = ["--a", "1", "--deepspeed", "x.json", "--b", "--deepspeed=", "--c", "2"]
    assert take_flag(words, "deepspeed") == (["--a", "1", "--b", "--c", "2"], "")
    assert take_flag(["--deepspeed"], "deepspeed") == ([], "")
    assert take_flag(["--x", "1"], "deepspeed") == (["--x", "1"], None)
    assert modernise(["--evaluation_strategy=no", "--no_cuda", "True"]) == ["--eval_strategy=no", "--use_cpu", "True"]
    assert modernise(["--warmup_ratio", "0.1"]) == ["--warmup_steps", "0.1"]
    assert modernise(["--warmup_ratio", "0.1", "--warmup_steps", "50"]) == ["--warmup_steps", "50"]
    assert modernise(["--past_index", "-1", "--seed", "3"]) == ["--seed", "3"]
