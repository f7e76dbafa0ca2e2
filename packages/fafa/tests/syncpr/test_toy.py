"""fafa-syncpr-toy and the models it teaches: from nothing to a trained FAFA by ordinary commands."""

import json
import re
from pathlib import Path

import pytest

from fafa.options import check_training_flags, get_args
from fafa.syncpr.seeds import read_seed_lists
from tbps_common.datasets import load_syncpr
from tbps_common.images import read_image
from tbps_world.cli import syncpr_toy_main
from tbps_world.tiny.syncpr import clip_tokenizer, words_of
from tbps_world.toys.syncpr import SIDE, TEMPLATE, toy_attributes, train_arguments


def test_the_toys_seed_lists_speak_the_words_that_the_tiny_models_know(tmp_path: Path) -> None:
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(toy_attributes()), encoding="utf-8")
    lists = read_seed_lists(str(path))
    known = set(words_of(None)) | {"nothing", "hands", "the", "in"}
    for values in [*lists.person.values(), *lists.picture.values()]:
        for value in values:
            assert set(re.findall(r"[a-z-]+", value)) <= known, value


def test_the_tokenizer_makes_every_word_one_token() -> None:
    words = words_of(None)
    tokenizer = clip_tokenizer(words)
    for word in words:
        parts = word.lower().replace("-", " ").split()
        assert len(tokenizer(" ".join(parts)).input_ids) == len(parts) + 2, word
    assert tokenizer.decode(tokenizer("a quiz").input_ids, skip_special_tokens=True) == "a quiz"


def test_the_training_command_is_sound(tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path, tmp_path / "fafa" / "tiny.yaml", 3, "cpu")
    flags = get_args(arguments)
    assert check_training_flags(flags) == [] and flags.num_epochs == 3
    assert flags.syncpr_data_path == str(tmp_path / "syncpr")


@pytest.mark.slow
def test_toy_goes_from_nothing_to_a_trained_model_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "toy"
    size = ["--ids", "24", "--updates", "2", "--lora-steps", "2", "--count", "20", "--variants", "1", "--steps", "1"]
    lenient = [
        "--min-image-text",
        "-1",
        "--min-identity",
        "-1",
        "--max-pair-similarity",
        "2",
        "--epochs",
        "1",
        "--start",
        "random",
    ]
    command = ["--out", str(out), *size, *lenient]
    assert syncpr_toy_main(command) == 0
    shown = capsys.readouterr().out
    commands = [line.removeprefix("$ ").split(" --")[0] for line in shown.splitlines() if line.startswith("$ ")]
    stages = [f"fafa-syncpr {stage}" for stage in ("pairs", "lora", "quadruples", "images", "filter", "pack")]
    assert commands[0] == "tbps-synth" and commands[1].startswith("fafa-make-tiny")
    assert commands[2:] == ["fafa-syncpr-make-tiny", *stages, "fafa-train", "fafa-infer"]
    assert "FAFA trained on the result: R1" in shown and "by chance:" in shown

    records = load_syncpr(out / "syncpr")
    assert records and all(read_image(record.target_image_path).size == (192, 384) for record in records)
    whole = next((out / "syncpr").glob("test1/img/*.png"))
    assert read_image(whole).size == (SIDE, SIDE)
    line = json.loads((out / "pairs" / "captions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["caption"].startswith(TEMPLATE.partition("{")[0])
    stages_file = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    assert all(numbers["kept"] > 0 for numbers in stages_file.values())
    assert (out / "metrics.json").is_file() and (out / "syncpr" / "preview.png").is_file()

    assert syncpr_toy_main(command) == 0
    again = capsys.readouterr().out
    assert "all 2 steps are done already" in again and "20 of 20 pictures are there already" in again
    assert len(list((out / "runs").iterdir())) == 1
