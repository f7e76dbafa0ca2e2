"""cmlfa-toy: its commands are the README's (the toys run whole in tests/world)."""

import re
from pathlib import Path

import pytest

from cmlfa.options import check_training_flags, get_args
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
