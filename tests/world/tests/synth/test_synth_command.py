"""`tbps-synth`: the same world every time, and a clear refusal otherwise."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tbps_world.cli import synth_main
from tbps_world.synth import generate as generate_module
from tbps_world.synth.generate import MANIFEST, generate
from tbps_world.synth.layouts.registry import LAYOUTS
from tbps_world.synth.world import PRESETS, Settings

MINI = Settings("tiny", 0, 4, 1, 2, 2, 64)


def manifest(out: Path) -> dict:
    return json.loads((out / MANIFEST).read_text(encoding="utf-8"))


def content(out: Path) -> dict[str, str]:
    """Digest of every file, symbolic links followed."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts of a world of seven people. Tests must not write into it."""
    out = tmp_path_factory.mktemp("mini") / "world"
    generate(out, MINI, list(LAYOUTS))
    return out


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path, mini: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        generate(tmp_path / name, replace(MINI, seed=seed), list(LAYOUTS))
    assert content(tmp_path / "again") == content(mini)
    first, other = manifest(tmp_path / "again"), manifest(tmp_path / "other")
    for name, layout in LAYOUTS.items():
        assert first["layouts"][name]["annotations_sha256"] != other["layouts"][name]["annotations_sha256"]
        if layout.name != "finetune":
            assert first["layouts"][name]["pixels_sha256"] != other["layouts"][name]["pixels_sha256"]
    assert first["lexicon_words"] == other["lexicon_words"]


def test_workers_do_not_change_the_world(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "_PICTURES_PER_WORKER", 1)
    generate(tmp_path / "world", PRESETS["tiny"], ["cuhk", "dp"], workers=2)
    assert manifest(tmp_path / "world")["layouts"]["cuhk"] == manifest(tiny)["layouts"]["cuhk"]
    for name, digest in content(tmp_path / "world").items():
        if name != MANIFEST:
            assert hashlib.sha256((tiny / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_layout_alone_equals_itself_among_all(tmp_path: Path, mini: Path, name: str) -> None:
    generate(tmp_path / "one", MINI, [name])
    everything = content(mini)
    for path, digest in content(tmp_path / "one").items():
        assert path == MANIFEST or everything[path] == digest
    assert set(manifest(tmp_path / "one")["layouts"]) == {name, *LAYOUTS[name].needs}
    assert manifest(tmp_path / "one")["layouts"][name] == manifest(mini)["layouts"][name]


def test_an_existing_world_is_kept_and_force_draws_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--out",
        str(tmp_path / "w"),
        "--ids",
        "7",
        "--views",
        "2",
        "--height",
        "64",
        "--layouts",
        "cuhk",
        "--preset",
        "tiny",
    ]
    assert synth_main(arguments) == 0
    picture = next((tmp_path / "w/CUHK-PEDES").rglob("*.png"))
    before = content(tmp_path / "w")
    picture.write_bytes(b"damaged")
    assert synth_main(arguments) == 0
    assert "already there" in capsys.readouterr().out and picture.read_bytes() == b"damaged"
    assert synth_main([*arguments, "--force"]) == 0
    assert content(tmp_path / "w") == before


def test_a_further_layout_joins_an_existing_world(tmp_path: Path) -> None:
    generate(tmp_path / "w", MINI, ["cuhk"])
    _, drawn = generate(tmp_path / "w", MINI, ["rstp"])
    assert drawn and set(manifest(tmp_path / "w")["layouts"]) == {"cuhk", "rstp"}
    assert (tmp_path / "w/CUHK-PEDES/reid_raw.json").is_file() and (
        tmp_path / "w/RSTPReid/data_captions.json"
    ).is_file()


def test_another_world_is_replaced_only_by_force_and_other_files_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w"
    generate(out, MINI, ["cuhk", "sda"])
    (out / "data/mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--force"):
        generate(out, replace(MINI, seed=1), ["cuhk"])
    assert synth_main(["--out", str(out), "--preset", "tiny"]) == 2
    assert "--force" in capsys.readouterr().err
    generate(out, replace(MINI, seed=1), ["cuhk"], force=True)
    assert (out / "data/mine.txt").read_text(encoding="utf-8") == "mine"
    assert not (out / "images/SDA").exists() and not (out / "data/sda").exists()
    assert manifest(out)["settings"]["seed"] == 1


def test_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert synth_main(["--out", str(tmp_path), "--preset", "tiny", "--layouts", "cuhk"]) == 2
    message = capsys.readouterr().err
    assert "not made by tbps-synth" in message and "thesis.txt" in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"made_by": "somebody"}', "not json"])
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    assert synth_main(["--out", str(tmp_path), "--preset", "tiny", "--layouts", "cuhk", "--force"]) == 2
    assert (tmp_path / MANIFEST).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("when", ["drawing", "installing"])
def test_an_interrupted_run_does_not_look_finished_and_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out = tmp_path / "w"

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "drawing":
            patch.setattr(generate_module, "_annotate", interrupted)
        else:
            patch.setattr(generate_module, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(out, MINI, ["cuhk"])
    assert not (out / MANIFEST).exists()
    if when == "installing":
        (out / ".tbps-synth-unfinished").mkdir(exist_ok=True)  # as a killed process leaves it
    generate(out, MINI, ["cuhk"])
    generate(tmp_path / "whole", MINI, ["cuhk"])
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--layouts", "cuhk,market"], "market"),
        (["--layouts", ","], "--layouts"),
        (["--ids", "2"], "--ids"),
        (["--views", "1"], "--views"),
        (["--height", "32"], "--height"),
        (["--height", "129"], "--height"),
        (["--workers", "0"], "--workers"),
        (["--preset", "large"], "--preset"),
        (["--format", "gif"], "--format"),
        (["--seed", "x"], "--seed"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_flags_end_with_status_2_and_name_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    try:
        status = synth_main(["--out", str(tmp_path / "w"), *arguments])
    except SystemExit as exit_of_argparse:
        status = exit_of_argparse.code
    assert status == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_missing_out_and_a_file_as_out_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth_main(["--preset", "tiny"]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert synth_main(["--out", str(tmp_path / "file"), "--preset", "tiny"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_ids_views_height_and_format_are_obeyed(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "w"), "--ids", "11", "--views", "3", "--height", "80", "--format", "jpg"]
    assert synth_main([*arguments, "--preset", "tiny", "--layouts", "cuhk"]) == 0
    records = json.loads((tmp_path / "w/CUHK-PEDES/reid_raw.json").read_text(encoding="utf-8"))
    assert len({record["id"] for record in records}) == 11 and len(records) == 33
    assert {record["split"] for record in records} == {"train", "val", "test"}
    with Image.open(tmp_path / "w/CUHK-PEDES/imgs" / records[0]["file_path"]) as image:
        assert (image.format, image.size) == ("JPEG", (40, 80))


def test_without_links_the_folders_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("this file system has no links")

    generate(tmp_path / "links", MINI, ["finetune"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        patch.setattr(os, "link", refuse)
        generate(tmp_path / "copies", MINI, ["finetune"])
    assert not (tmp_path / "copies/images/ICFG-PEDES").is_symlink()
    for folder in ("images/CUHK-PEDES/imgs", "images/ICFG-PEDES", "images/RSTPReid"):
        assert content(tmp_path / "copies" / folder) == content((tmp_path / "links" / folder).resolve()) != {}


def test_the_contact_sheet_shows_ten_people_in_four_views(tmp_path: Path) -> None:
    assert synth_main(["--contact_sheet", str(tmp_path / "sheet.png"), "--preset", "tiny"]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (10 * 50 + 2, 4 * 98 + 2)
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 200


def test_the_contact_sheet_in_the_documentation_is_this_worlds(tmp_path: Path) -> None:
    """If this fails: tbps-synth --preset small --contact_sheet docs/synthetic_pedestrians.png"""
    assert synth_main(["--contact_sheet", str(tmp_path / "sheet.png"), "--preset", "small"]) == 0
    stored = Path(__file__).parents[4] / "docs/synthetic_pedestrians.png"
    assert stored.stat().st_size < 300_000
    with Image.open(stored) as old, Image.open(tmp_path / "sheet.png") as new:
        assert np.array_equal(np.asarray(old), np.asarray(new))


def test_help_answers_within_a_second_and_neither_help_nor_drawing_imports_torch(tmp_path: Path) -> None:
    ask = "import sys; from tbps_world.cli import synth_main\ntry: synth_main(['--help'])\nexcept SystemExit: pass\n"
    times = []
    for _ in range(2):
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", ask + "assert 'numpy' not in sys.modules"], check=True, capture_output=True
        )
        times.append(time.monotonic() - started)
    assert min(times) < 1
    draw = (
        "import sys; import tbps_world.synth.generate, tbps_world.synth.contact_sheet\n"
        "assert not {'torch', 'matplotlib', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", draw], check=True, capture_output=True)
