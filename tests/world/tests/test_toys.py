"""The toys in short forms, from nothing to their results and again; compare-toy then asks the models that they left."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tbps_world.cli import cmlfa_toy_main, compare_toy_main, diana_toy_main, fafa_toy_main, mra_toy_main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compare-toy looks for the toys' folders."""
    return tmp_path_factory.mktemp("toys")


def require_pictures(folder: Path, *names: str) -> None:
    for name in names:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_cmlfa(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "cmlfa"
    flags = ["--out", str(out), "--preset", "tiny", "--epochs", "1", "--start", "random"]
    flags += ["--lfa_attention", "parts", "batch"]
    assert cmlfa_toy_main(flags) == 0
    shown = capfd.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("$ ")] == [
        "tbps-synth",
        "cmlfa-make-tiny-clip",
        *["python"] * 5,
    ]
    evaluations = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    # Where the features depend on the test batch, a second one is tried.
    assert [evaluation["settings"]["test_batch_size"] for evaluation in evaluations] == [512, 512, 64]
    for evaluation in evaluations:
        assert f"{evaluation['metrics']['t2i']['R1']:.2f}" in shown
        assert f"started from: {evaluation['start_R1']:.2f}" in shown
    require_pictures(out, "cmc.png", "ranked_list.png")
    assert cmlfa_toy_main(flags) == 0
    assert capfd.readouterr().out.count("all 1 epochs are done already") == 2
    assert len(list((out / "logs" / "CUHK-PEDES").iterdir())) == 2


def test_fafa(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "fafa"
    flags = ["--out", str(out), "--ids", "48", "--epochs", "1", "--start", "random"]
    assert fafa_toy_main(flags) == 0
    shown = capfd.readouterr().out
    commands = [line.split()[1:3] for line in shown.splitlines() if line.startswith("$ ")]
    assert [words[0] for words in commands] == ["tbps-synth", "fafa-make-tiny", "python", "python"]
    assert commands[2][1] == "src/blip_fine_tune_new.py"
    assert commands[3][1] == "inference_fafa.py"
    evaluation = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert f"R1 {evaluation['metrics']['com']['R1']:.2f}" in shown
    assert f"R@1 by chance: {evaluation['chance_R1']:.2f}" in shown
    assert f"picture alone {evaluation['start_R1']['picture']:.2f}" in shown
    require_pictures(out, "cmc.png", "ranked_list.png")
    assert fafa_toy_main(flags) == 0
    assert "all 1 epochs are done already" in capfd.readouterr().out
    assert len(list((out / "runs").iterdir())) == 1


def test_mra(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "mra"
    flags = ["--out", str(out), "--preset", "tiny", "--start", "random", "--sda_epochs", "1", "--cuhk_epochs", "2"]
    assert mra_toy_main(flags) == 0
    shown = capfd.readouterr().out
    commands = [line for line in shown.splitlines() if line.startswith("$ ") and "torch" not in line]
    steps = ["tbps-synth", "mra-make-tiny", "--task sda", "--task cuhk", "--evaluate"]
    found = [next(i for i, line in enumerate(commands) if step in line) for step in steps]
    assert found == sorted(found)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    first = [stage["R1"] for stage in metrics["stages"].values()]
    assert f"ITC stage {first[0]:.2f} %, after re-ranking {first[1]:.2f} %" in shown
    assert metrics["chance_R1"] == pytest.approx(100 / 12)  # every person has equally many pictures
    # A second call finds everything done, and comes to the same figures.
    assert mra_toy_main(flags) == 0
    assert "all 2 epochs are done already" in capfd.readouterr().out
    again = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert again["stages"] == metrics["stages"]


def test_diana(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "diana"
    flags = ["--out", str(out), "--preset", "tiny", "--start", "random"]
    flags += ["--pretrain_steps", "2", "--finetune_steps", "2"]
    assert diana_toy_main(flags) == 0
    shown = capfd.readouterr().out
    assert re.findall(r"shell/(\w+)\.sh", shown) == ["pretrain", "finetune", "eval"]
    results = json.loads((out / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    assert [entry["turn_limit"] for entry in results] == [1, 2, 3, 4, 5]
    assert "R@1 by rounds of the dialogue" in shown
    assert f"{results[0]['metrics']['all']['r1']:.2f}" in shown
    require_pictures(out / "evaluation", "turns.png", "ranked_list.png")
    assert diana_toy_main(flags) == 0
    assert re.findall(r"shell/(\w+)\.sh", capfd.readouterr().out) == ["eval"]
    assert diana_toy_main([*flags, "--pretrain_steps", "3"]) == 2
    assert "other settings" in capfd.readouterr().err


def test_compare_toy_asks_all_models_and_goes_on(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "comparison.md"
    page.write_text("# Mine\n\nWords.\n", encoding="utf-8")
    flags = ["--out", str(folder), "--quick", "--page", str(page)]
    assert compare_toy_main(flags) == 0
    text = page.read_text(encoding="utf-8")
    for row in (
        "CMLFA",
        "CLIP",
        "MRA",
        "MRA, re-ranked 10",
        "FAFA",
        "CLIP, sum of both",
        "DiaNA",
        "MRA, joined dialogue",
    ):
        assert f"\n| {row} | " in text
    assert text.startswith("# Mine\n\nWords.\n") and str(folder) not in text
    figures = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert list(figures["dialogue"]["tasks"])[-1] == "dialogue, 5 rounds"
    assert str(folder) not in json.dumps(figures)
    capfd.readouterr()
    assert compare_toy_main(flags) == 0
    again = capfd.readouterr().out
    assert "-toy --out" not in again and "$ tbps-compare" not in again
    assert page.read_text(encoding="utf-8") == text
