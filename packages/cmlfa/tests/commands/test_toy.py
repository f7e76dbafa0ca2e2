"""cmlfa-toy: its commands are the README's, and together they end in numbers and pictures."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cmlfa.options import check_training_flags, get_args
from tbps_world.cli import cmlfa_toy_main
from tbps_world.toys.cmlfa import RANDOM_CLIP, TINY_CLIP_FLAGS, train_arguments

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_train_flags() -> list[str]:
    """Flags of the first train command in the package's README."""
    import shlex

    block = re.search(r"^python train\.py \\\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if block is None:
        pytest.fail("the README of cmlfa shows no train command")
    return shlex.split(block[1].replace("\\\n", " "))


@pytest.mark.parametrize("clip", ["start/clip/clip.pt", RANDOM_CLIP])
@pytest.mark.parametrize("attention", ["parts", "batch"])
def test_toy_runs_the_readme_command_with_flags_appended(attention: str, clip: str, tmp_path: Path) -> None:
    readme = [str(tmp_path / "world") if word == "your dataset root dir" else word for word in readme_train_flags()]
    arguments = train_arguments(tmp_path, attention, tmp_path / clip)
    assert arguments[: len(readme)] == readme
    args = get_args(arguments)
    check_training_flags(args)
    assert args.lfa_attention == attention
    assert args.loss_names.split("+") == ["sdm", "mlm", "id", "itc"] or "--loss_names" in arguments[len(readme) :]
    assert args.text_length <= int(TINY_CLIP_FLAGS[TINY_CLIP_FLAGS.index("--context_length") + 1])


@pytest.mark.slow
def test_toy_goes_from_nothing_to_results_and_goes_on_when_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "toy"), "--preset", "tiny", "--epochs", "1", "--lfa_attention", "batch"]
    flags += ["--start", "random"]
    assert cmlfa_toy_main(flags) == 0
    shown = capfd.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("$ ")] == [
        "tbps-synth",
        "cmlfa-make-tiny-clip",
        *["python"] * 3,
    ]
    evaluations = json.loads((tmp_path / "toy" / "metrics.json").read_text(encoding="utf-8"))
    assert [evaluation["settings"]["test_batch_size"] for evaluation in evaluations] == [512, 64]
    for evaluation in evaluations:
        assert f"{evaluation['metrics']['t2i']['R1']:.2f}" in shown
        assert f"started from: {evaluation['start_R1']:.2f}" in shown
    for name in ("cmc.png", "ranked_list.png"):
        with Image.open(tmp_path / "toy" / name) as picture:
            assert min(picture.size) > 200
    assert cmlfa_toy_main(flags) == 0
    assert "all 1 epochs are done already" in capfd.readouterr().out
    assert len(list((tmp_path / "toy" / "logs" / "CUHK-PEDES").iterdir())) == 1
