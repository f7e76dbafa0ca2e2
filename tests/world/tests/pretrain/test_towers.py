"""The start weights of MRA and DiaNA, of one step each: the papers' own loaders read them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tbps_world.cli import mra_tiny_main, train_tiny_main
from tbps_world.pretrain.attributes import CLASSES, UNKNOWN, Reader, album
from tbps_world.synth.lexicon import lexicon


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    assert train_tiny_main(["swin_bert", "swin_llama", "--steps", "1", "--out", str(folder)]) == 0
    return folder


def test_mra_starts_from_swin_bert(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mra.config import load_config
    from mra.model import Retrieval

    (tmp_path / "lexicon.txt").write_text("\n".join(lexicon()), encoding="utf-8")
    assert mra_tiny_main(["--out", str(tmp_path), "--lexicon", str(tmp_path / "lexicon.txt"), "--preset", "toy"]) == 0
    vocabulary = (tmp_path / "data/bert-base-uncased/vocab.txt").read_bytes()
    shutil.copytree(start / "swin_bert", tmp_path / "data", dirs_exist_ok=True)
    assert (tmp_path / "data/bert-base-uncased/vocab.txt").read_bytes() == vocabulary
    monkeypatch.chdir(tmp_path)
    state = Retrieval(load_config("configs/sda.yaml")).state_dict()
    swin = torch.load("data/swin_base_patch4_window7_224_22k.pth", weights_only=True)["model"]
    bert = load_file("data/bert-base-uncased/model.safetensors")
    for name in ("patch_embed.proj.weight", "layers.3.blocks.0.mlp.fc1.weight"):
        assert torch.equal(state[f"vision_encoder.{name}"], swin[name])
    for name in ("bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.3.output.dense.weight"):
        assert torch.equal(state[f"text_encoder.{name}"], bert[name])


def test_diana_starts_from_swin_llama(start: Path) -> None:
    from diana import DiaNAConfig, DiaNAModel

    folder = start / "swin_llama"
    config = DiaNAConfig.from_pretrained(folder / "configs")
    model = DiaNAModel.from_backbones(config, folder / "swinv2-tiny", folder / "llama-tiny")
    llama = load_file(folder / "llama-tiny/model.safetensors")
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.llama_tower.state_dict()[name], llama[f"model.{name}"])


def test_they_say_what_they_can_do(start: Path) -> None:
    for name, figures in (
        ("swin_bert", {"attributes read, %", "attributes seen, %", "colours seen, %"}),
        ("swin_llama", {"attributes told, %", "attributes seen, %", "colours seen, %"}),
    ):
        record = json.loads((start / name / "start.json").read_text(encoding="utf-8"))
        assert set(record["figures"]) == figures
        assert all(0 <= figure <= 100 for figure in record["figures"].values())


def test_album_leaves_persons_aside() -> None:
    pictures = album(32)  # drawn for the models above
    people = [tuple(person.codes()) for person in pictures.people]
    assert not set(people[: pictures.training]) & set(people[pictures.training :])
    assert len(pictures.pixels) == len(pictures.shown) == 2 * 32 * 2 == len(pictures.captions) // 2
    # What a caption says can be seen.
    said, shown = pictures.said, pictures.shown.repeat_interleave(2, dim=0)
    assert bool((said == shown)[said != UNKNOWN].all())


def test_reader_counts_right_answers_only() -> None:
    reader = Reader(3, unknown=True)
    codes = torch.full((2, len(CLASSES)), UNKNOWN)
    codes[1] = 1
    feature = torch.zeros(2, 3)
    with torch.no_grad():
        reader.weight.zero_()
        reader.bias.zero_()
        for start, size in zip([0, *torch.tensor(reader.sizes).cumsum(0).tolist()], reader.sizes):
            reader.bias[start] = 1.0  # "not said" wins
            assert size > 2
    assert reader.right(feature, codes).tolist() == [[True] * len(CLASSES), [False] * len(CLASSES)]
    known = Reader(3, unknown=False)
    assert torch.isfinite(known.loss(feature, codes))
