"""`tbps-model` on the files of MRA."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench_mra_export import main as bench_main
from mra import Retrieval
from mra.cli import index_main, retrieval_main, search_main
from mra.retrieval import encode_images, encode_texts
from mra.text import build_tokenizer, tokenize
from tbps_common.cli import index_main as tbps_index_main
from tbps_common.cli import model_main
from tbps_common.cli import search_main as tbps_search_main
from tbps_common.models.export import open_encoder
from tbps_common.report.evaluation import read_evaluation


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("data/checkpoint/ft_rstp.pth", "checkpoint of MRA"),
        ("data/checkpoint/pretrain.pth", "checkpoint of MRA"),
        ("data/bert-base-uncased", "BERT"),
        ("data/swin_base_patch4_window7_224_22k.pth", "Swin"),
    ],
)
def test_checkpoints_and_start_files_are_recognised(file: str, layout: str, in_world: Path, tmp_path: Path) -> None:
    assert model_main(["inspect", file, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["paper"] == "MRA" and found["layout"].startswith(layout) and found["fits"] is True


def test_the_configuration_in_a_checkpoint_tells_the_size_of_images(
    trained: Path, in_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model_main(["inspect", str(trained / "checkpoint_best.pth"), "--no_checksum"]) == 0
    assert "images of 96 x 96" in capsys.readouterr().out
    bare = torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"]
    torch.save(bare, tmp_path / "bare.pth")
    assert model_main(["inspect", str(tmp_path / "bare.pth"), "--no_checksum"]) == 0
    assert "images of" not in capsys.readouterr().out


@pytest.fixture
def hub(trained: Path, in_world: Path, tmp_path: Path) -> Path:
    """The trained model in the layout of the hub."""
    out = tmp_path / "hub"
    assert model_main(["convert", str(trained / "checkpoint_best.pth"), "--to", "hub", "--out", str(out)]) == 0
    return out


def test_conversion_to_the_hub_and_back_keeps_every_bit(hub: Path, trained: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert model_main(["convert", str(hub), "--to", "official", "--out", str(tmp_path / "back.pth")]) == 0
    before = torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    loaded = Retrieval.from_pretrained(hub)
    loaded.save_pretrained(tmp_path / "again")
    for state in (back["model"], loaded.state_dict(), Retrieval.from_pretrained(tmp_path / "again").state_dict()):
        assert state.keys() == before.keys()
        assert all(
            state[name].dtype == before[name].dtype and torch.equal(state[name], before[name]) for name in before
        )
    assert back["config"]["vision_config"]["h"] == 96


def test_a_hub_folder_is_evaluated_trained_from_and_searched_with(
    hub: Path,
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, checkpoint in (("run", trained / "checkpoint_best.pth"), ("hub", hub)):
        more = ["--evaluate", "--report", "--checkpoint", str(checkpoint)]
        assert retrieval_main(flags("cuhk", tmp_path / name, *more)) == 0
    ours, theirs = (read_evaluation(tmp_path / name / "evaluation_test.json") for name in ("hub", "run"))
    assert ours["metrics"] == theirs["metrics"]
    assert retrieval_main(flags("cuhk", tmp_path / "ft", "--checkpoint", str(hub), "--epo", "1")) == 0
    images = in_world / "images" / "CUHK-PEDES"
    monkeypatch.chdir(tmp_path)  # the configuration, the vocabulary and the weights all come from the folder
    model = ["--model", f"mra:{hub}", "--gallery", "g.lance", "--device", "cpu"]
    assert tbps_index_main([*model, "--images", str(images), "--num_workers", "0"]) == 0
    assert tbps_search_main([*model, "--text", "a man in red", "--judge", "2"]) == 0
    same = ["--checkpoint", str(hub), "--device", "cpu"]
    assert index_main([*same, "--images", str(images), "--out", "h.lance", "--num_workers", "0"]) == 0
    assert search_main([*same, "--index", "h.lance", "--text", "a man in red", "--rerank", "2"]) == 0


def test_a_bare_file_needs_its_configuration(
    trained: Path, in_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"], tmp_path / "bare.pth")
    command = ["convert", str(tmp_path / "bare.pth"), "--to", "hub", "--out", str(tmp_path / "hub")]
    for more, named in (
        ([], "--config configs/cuhk.yaml"),
        (["--config", "configs/rstp.yaml"], "of another size"),
        (["--config", "configs/cuhk.yaml", "--tokenizer", str(tmp_path)], "there is no"),
    ):
        assert model_main([*command, *more]) == 2
        assert named in capsys.readouterr().err and not (tmp_path / "hub").exists()
    assert model_main([*command, "--config", "configs/cuhk.yaml"]) == 0


def test_exported_encoders_give_the_features_of_torch(
    hub: Path, in_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself fails below a cosine of 0.9999; other batches than the exported one are among those compared."""
    out = str(tmp_path / "onnx")
    assert model_main(["export", str(hub), "--onnx", "--int8", "--out", out, "--batch_size", "3"]) == 0
    model = Retrieval.from_pretrained(hub)
    images = torch.rand(5, 3, 96, 96)
    ids, mask = tokenize(
        build_tokenizer(hub), ["a man in red", "a woman", "blue shoes, a bag", "x", "y"], model.settings.max_tokens
    )
    for name, inputs, expected in (
        ("image", (images,), encode_images(model, images)[1]),
        ("text", (ids, mask), encode_texts(model, ids, mask)[1]),
    ):
        found = open_encoder(tmp_path / "onnx" / f"{name}.onnx")(*inputs)
        assert (expected - expected.roll(1, 0)).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    data = ["--ann_file", "data/finetune/cuhk_test.json", "--image_root", "images/CUHK-PEDES/imgs"]
    assert bench_main(["--checkpoint", str(hub), "--onnx", out, *data]) == 0
    rows = [
        line.split("|")[2:4] for line in capsys.readouterr().out.splitlines() if "onnx" in line or "torch |" in line
    ]
    assert len(rows) == 3 and rows[0] == rows[1]
