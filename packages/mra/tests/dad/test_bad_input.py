"""What cannot work is told in one line that names the file or flag, before anything is written."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mra.cli import dad_main

Flags = Callable[..., list[str]]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    try:
        status = dad_main(arguments)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.strip().splitlines()[-1].count("error:") == 1
    return message.strip().splitlines()[-1]


def replaced(arguments: list[str], flag: str, value: str) -> list[str]:
    """The command line with another value of a flag."""
    place = arguments.index(flag) + 1
    return [*arguments[:place], value, *arguments[place + 1 :]]


@pytest.mark.parametrize(
    "command, more, said",
    [
        ("finetune", ["--height", "63"], "--height 63"),
        ("finetune", ["--epochs", "0"], "must be at least 1"),
        ("finetune", ["--lr", "nan"], "must be finite"),
        ("finetune", ["--empty_prompts", "1"], "must be below 1"),
        ("finetune", ["--batch_size", "4000"], "do not fill one batch"),
        ("generate", ["--width", "33"], "--width 33"),
        ("generate", ["--quality", "101"], "--quality 101"),
        ("generate", ["--shard", "3/2"], "--shard"),
        ("generate", ["--shard", "half"], "--shard"),
        ("generate", ["--controlnet", "a/b", "--lora", "c/d"], "give one of them"),
        ("generate", ["--controlnet", "/nowhere/controlnet"], "--controlnet /nowhere/controlnet is not a folder"),
        ("generate", ["--device", "gpu"], "--device"),
        ("generate", ["--precision", "fp8"], "--precision"),
        ("filter", ["--min_keypoints", "-1"], "--min_keypoints"),
        ("filter", ["--pose_model", "/nowhere/pose"], "--pose_model /nowhere/pose is not a folder"),
        ("regions", ["--box_threshold", "1.5"], "--box_threshold"),
        ("regions", ["--pack", "--shard", "1/2"], "--pack"),
        ("filter", ["--shard", "1/2", "--no_such_flag"], "--no_such_flag"),
    ],
)
def test_flags(
    command: str, more: list[str], said: str, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(flags(command, tmp_path, *more), capsys)
    assert not list(tmp_path.iterdir())


def test_stages_name_the_one_that_comes_before(
    tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, before in (("filter", "generate"), ("caption", "filter"), ("regions", "caption")):
        assert f"run mra-dad {before} --work" in refused(flags(command, tmp_path), capsys)
    assert "run mra-dad regions --work" in refused(flags("regions", tmp_path, "--pack"), capsys)


def test_training_pairs(tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.json"
    contents: list[tuple[str | None, str]] = [
        (None, "does not exist"),
        ("", "is empty"),
        ('[{"image": "a.png"', "not valid JSON"),
        ("[]", "holds no"),
        ('{"a": 1}', "a list of objects is needed"),
        ('[{"image": "a.png", "image_id": 1}]', "caption"),
        ('[{"image": "../../etc/passwd", "caption": "a man", "image_id": 1}]', "../../etc/passwd"),
        ('[{"image": "a.png", "caption": ["a man"], "image_id": 1}]', "holds a list"),
    ]
    for text, said in contents:
        if text is not None:
            file.write_text(text)
        for command in ("finetune", "generate"):
            folder = tmp_path / "run"
            assert said in refused(replaced(flags(command, folder), "--train_file", str(file)), capsys), text
            assert not folder.exists()
    file.write_text('[{"image": "a.png", "caption": "a man", "image_id": 1}]')
    message = refused(replaced(flags("finetune", tmp_path / "run"), "--train_file", str(file)), capsys)
    assert "1 images" in message and "--image_root" in message


def test_an_image_that_cannot_be_read(
    world: Path, pairs: list[str], tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    image_root = tmp_path / "imgs"
    shutil.copytree(pairs[3], image_root)
    image = image_root / json.loads(Path(pairs[1]).read_text(encoding="utf-8"))[0]["image"]
    image.write_bytes(b"")
    words = replaced(flags("finetune", tmp_path), "--image_root", str(image_root))
    assert str(image) in refused(words, capsys)
    assert dad_main([*words, "--bad_images", "skip"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the next item takes their place") == 1 and str(image) in shown


def test_synonyms(tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.json").write_text('{"man": "guy"}')
    arguments = replaced(flags("generate", tmp_path / "run"), "--synonyms", str(tmp_path / "words.json"))
    assert "words.json" in refused(arguments, capsys)


def test_models(world: Path, made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no model" in refused(replaced(flags("generate", tmp_path), "--model", str(empty)), capsys)
    assert "is a file" in refused(replaced(flags("generate", tmp_path), "--model", str(world / "lexicon.txt")), capsys)
    assert "no folder of this name" in refused(replaced(flags("generate", tmp_path), "--model", "owner/absent"), capsys)
    # A folder with another kind of model.
    pose = str(world / "models/pose")
    message = refused(replaced(flags("finetune", tmp_path), "--model", pose), capsys)
    assert f"--model {pose} cannot be loaded" in message
    # Weights that end too early.
    cut = tmp_path / "cut"
    shutil.copytree(made / "model/controlnet", cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"--controlnet {cut} cannot be loaded" in refused(
        flags("generate", tmp_path, "--controlnet", str(cut)), capsys
    )
    assert not (tmp_path / "work").exists() and not (tmp_path / "model").exists()


def test_other_kinds_of_models(
    world: Path, made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "run"
    shutil.copytree(made, work)
    for path in (work / "work").glob("regions*"):
        path.unlink()
    captioner = str(world / "models/captioner")
    assert f"--model {captioner} cannot be loaded" in refused(
        replaced(flags("regions", work), "--model", captioner), capsys
    )


def test_records_and_pictures(made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "run"
    shutil.copytree(made, work)
    for path in (work / "work").glob("filtered*"):
        path.unlink()
    (work / "images/c_0_5000/0_1.jpg").unlink()
    message = refused(flags("filter", work), capsys)
    assert "1 images" in message and "--images" in message
    file = work / "work/generated.jsonl"
    lines = file.read_text().splitlines()
    for bad, said in (
        ('{"image": "../x.jpg", "index": 0, "variant": 0}', "does not lie below --images"),
        ('{"index": 0, "variant": 0}', "without image, index or variant"),
        ("[1]", "not a JSON object"),
        ('{"image": "a.jpg", "index": NaN}', "line 13"),
    ):
        file.write_text("\n".join([*lines, bad]) + "\n")
        assert said in refused(flags("filter", work), capsys)
    file.write_text("\n".join(lines) + "\n")
    manifest = work / "work/generated.jsonl.manifest.json"
    manifest.write_text("{")
    assert "manifest.json is damaged" in refused(flags("filter", work), capsys)
    assert not list((work / "work").glob("filtered*"))
    for stem, command, field in (("captioned", ["regions"], "caption"), ("regions", ["regions", "--pack"], "boxes")):
        file = work / f"work/{stem}.jsonl"
        file.write_text(file.read_text().replace(f'"{field}":', '"other":', 1))
        message = refused(flags(command[0], work, *command[1:]), capsys)
        assert f"{stem}*.jsonl" in message and f"has no {field}" in message


def test_low_rank_matrices_in_a_pickle(
    world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    from mra.dad.denoiser import build_networks, save_weights

    folder = tmp_path / "lora"
    model = str(world / "models/diffusion")
    networks = build_networks(model, "lora", (64, 32), torch.device("cpu"), torch.float32, lora_rank=2)
    save_weights(networks.denoiser, folder)
    weights = folder / "pytorch_lora_weights.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    (folder / "config.json").write_text("{}")
    assert f"--lora {folder} cannot be loaded" in refused(
        flags("generate", tmp_path / "run", "--lora", str(folder)), capsys
    )


def test_state_that_cannot_be_read(
    made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    content = (made / "model/last.pth").read_bytes()
    for part, said in ((b"", "is empty"), (content[: len(content) // 2], "is cut off")):
        (tmp_path / "model/last.pth").write_bytes(part)
        message = refused(flags("finetune", tmp_path), capsys)
        assert said in message and "last.pth" in message
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["last.pth"]


def test_missing_extra(
    tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else find(name, *more)
    )
    message = refused(flags("generate", tmp_path), capsys)
    assert "needs diffusers" in message and "pip install 'packages/mra[dad]'" in message


@pytest.mark.parametrize("command", ["finetune", "generate", "filter", "caption", "regions"])
def test_help_teaches_and_imports_nothing_heavy(command: str) -> None:
    program = (
        "import sys\nfrom mra.cli import dad_main\ntry:\n    dad_main([sys.argv[1], '--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'diffusers', 'peft', 'transformers', 'numpy') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "HEAVY []" in shown.stdout and len(shown.stdout) > 500


def test_no_other_command_imports_the_extra() -> None:
    from mra.model.settings import PACKAGE

    own = PACKAGE / "dad"
    for path in PACKAGE.rglob("*.py"):
        if own in path.parents:
            continue
        text = path.read_text(encoding="utf-8")
        assert "diffusers" not in text and "peft" not in text, path
        assert "mra.dad" not in text or path.name == "cli.py", path
