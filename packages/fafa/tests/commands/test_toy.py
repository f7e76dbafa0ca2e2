"""fafa-toy and its maker: the commands are the README's (the toys run whole in tests/world)."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fafa.options import check_training_flags, get_args
from tbps_common.datasets import ITCPR, load_syncpr
from tbps_world.tiny.fafa import main as make_toy
from tbps_world.toys.fafa import RANDOM_MODEL, chance_of_first, train_arguments

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_flags(script: str) -> list[str]:
    """Flags of the first command of the package's README that runs `script`."""
    block = re.search(
        rf"^python {re.escape(script)} \\\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    if block is None:
        pytest.fail(f"the README of fafa shows no command with {script}")
    return shlex.split(block[1].replace("\\\n", " "))


@pytest.mark.parametrize("model", ["start/blip2", RANDOM_MODEL])
def test_toy_runs_the_readme_command_with_flags_appended(model: str, tmp_path: Path) -> None:
    places = {
        "/your/custom/syncpr/root": str(tmp_path / "world" / "SynCPR"),
        "/your/custom/itcpr/root": str(tmp_path / "world" / "ITCPR"),
    }
    readme = [places.get(word, word) for word in readme_flags("src/blip_fine_tune_new.py")]
    arguments = train_arguments(tmp_path, tmp_path / model / "tiny.yaml")
    assert arguments[: len(readme)] == readme
    assert check_training_flags(get_args(arguments)) == []


def test_readme_inference_command_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fafa.cli import infer_main

    assert infer_main(readme_flags("inference_fafa.py")) == 2  # there is no such run, and that is all that is wrong
    assert "--exp-dir output/cpr/FAFA_experiment does not exist" in capsys.readouterr().err


def test_maker_writes_what_the_specification_lists(tmp_path: Path) -> None:
    assert make_toy([str(tmp_path)]) == 0
    model = yaml.safe_load((tmp_path / "tiny.yaml").read_text(encoding="utf-8"))["model"]
    assert (model["image_size"], model["num_query_token"], model["tokenizer"]) == (28, 8, "vocab.txt")
    vocabulary = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocabulary)) == len(vocabulary)
    triplets = load_syncpr(tmp_path / "syncpr")
    assert [triplet.cpr_id for triplet in triplets] == [number // 2 for number in range(16)]
    for triplet in triplets:
        with Image.open(triplet.reference_image_path) as picture:
            assert picture.size == (192, 384)
        words = re.findall(r"[a-z]+|[^\sa-z.]", triplet.edit_caption.lower())
        assert set(words) <= set(vocabulary)
    data = ITCPR(tmp_path / "itcpr", verbose=False)
    assert (data.query["instance_ids"], data.gallery["instance_ids"]) == ([1, 2, 3, 4], [1, 2, 3, 4, -1])
    assert chance_of_first(data) == pytest.approx(20)


def test_a_model_for_pedestrians_knows_their_words(tmp_path: Path) -> None:
    from fafa.model.settings import read_settings
    from fafa.model.tokenizer import build_tokenizer
    from tbps_world.synth.lexicon import lexicon

    assert make_toy([str(tmp_path), "--for", "pedestrians"]) == 0
    settings = read_settings(tmp_path / "tiny.yaml")
    assert not settings.freeze_vit  # it starts from random weights
    tokenizer = build_tokenizer(settings.tokenizer)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(lexicon()))["input_ids"]
