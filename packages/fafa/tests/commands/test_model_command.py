"""`tbps-model` on the files of FAFA."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_fafa_export import main as bench_main
from fafa.checkpoint import official_state_dict
from fafa.cli import infer_main, train_main
from fafa.model import Blip2FAFACPR
from tbps_common.cli import index_main, model_main
from tbps_common.models.export import open_encoder
from tbps_common.report.evaluation import read_evaluation
from tbps_world.tiny.fafa import TINY_MODEL


@pytest.mark.parametrize("vit", ["eva_clip_g", "clip_L"])
def test_a_checkpoint_blip2_and_the_bare_tower_are_recognised(vit: str, toy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TINY_MODEL, "tokenizer": str(toy / "vocab.txt"), "vit_model": vit}
    state = official_state_dict(Blip2FAFACPR.from_config(settings))
    prefix = "visual_encoder."
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # LAVIS's files of the bare tower hold one block more.
    last = {name.replace("locks.1.", "locks.2."): tensor for name, tensor in tower.items() if "locks.1." in name}
    files = {
        "checkpoint of FAFA": {"model": state, "epoch": 3},
        "BLIP-2": {name: tensor for name, tensor in state.items() if not name.startswith("mlm_predictor.")},
        "EVA-CLIP" if vit == "eva_clip_g" else "CLIP ViT-L": tower | last,
    }
    for number, (layout, content) in enumerate(files.items()):
        torch.save(content, tmp_path / f"{number}.pth")
        assert model_main(["inspect", str(tmp_path / f"{number}.pth"), "--json", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert found["paper"] == "FAFA" and found["layout"].startswith(layout) and found["fits"] is True
        assert f"{3 if number == 2 else 2} blocks" in found["sizes"]["image tower"]


NAME = "tuned_last_recall_at1.pt"


@pytest.fixture
def hub(trained_run: Path, tmp_path: Path) -> Path:
    """The trained run in the layout of the hub."""
    out = tmp_path / "hub"
    assert model_main(["convert", str(trained_run / "saved_models" / NAME), "--to", "hub", "--out", str(out)]) == 0
    return out


def test_conversion_to_the_hub_and_back_keeps_every_bit(hub: Path, trained_run: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert model_main(["convert", str(hub), "--to", "official", "--out", str(tmp_path / "back.pt")]) == 0
    before = torch.load(trained_run / "saved_models" / NAME, weights_only=True)["model"]
    loaded = Blip2FAFACPR.from_pretrained(str(hub))
    assert loaded.fda_k == 6 and not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    again = Blip2FAFACPR.from_pretrained(tmp_path / "again")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    for state in (back, official_state_dict(loaded), official_state_dict(again)):
        assert state.keys() == before.keys()
        assert all(
            state[name].dtype == before[name].dtype and torch.equal(state[name], before[name]) for name in before
        )


def test_half_precision_and_tied_matrices_come_through(trained_run: Path, tmp_path: Path) -> None:
    """As the released checkpoint: the ViT's matrices in float16, one tensor under two names."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("training_state")))
    content = torch.load(run / "saved_models" / NAME, weights_only=True)
    state = content["model"]
    halves = [name for name in state if name.startswith("visual_encoder.blocks.") and state[name].dim() == 2]
    state |= {name: state[name].half() for name in halves}
    twin = "Qformer.cls.predictions.decoder.weight"
    state[twin] = state["Qformer.bert.embeddings.word_embeddings.weight"]
    torch.save(content, run / "saved_models" / "half.pt")
    hub, back = tmp_path / "hub", tmp_path / "back.pt"
    assert model_main(["convert", str(run / "saved_models" / "half.pt"), "--to", "hub", "--out", str(hub)]) == 0
    assert model_main(["convert", str(hub), "--to", "official", "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)["model"]
    assert halves and found.keys() == state.keys()
    assert all(found[name].dtype == state[name].dtype and torch.equal(found[name], state[name]) for name in state)
    assert found[twin].data_ptr() == found["Qformer.bert.embeddings.word_embeddings.weight"].data_ptr()


def test_a_hub_folder_is_evaluated_and_trained_from_like_a_run(
    hub: Path,
    trained_run: Path,
    toy: Path,
    train_flags: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same = ["--itcpr-root", str(toy / "itcpr"), "--device", "cpu", "--num-workers", "0"]
    run = Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("training_state")))
    assert infer_main(["--exp-dir", str(run), "--model-name", NAME, *same]) == 0
    snapshot = shutil.copytree(hub, tmp_path / "models--owner--name" / "snapshots" / "0")
    held = sorted(path.name for path in snapshot.iterdir())
    monkeypatch.chdir(tmp_path)
    assert infer_main(["--exp-dir", str(snapshot), *same]) == 0
    assert sorted(path.name for path in snapshot.iterdir()) == held  # nothing of ours comes into the hub's cache
    assert (tmp_path / "results" / "owner--name" / "inference_results_tuned_recall_at1_step.pt.json").is_file()
    pictures = ["--images", str(toy / "itcpr"), "--out", "g.lance", "--device", "cpu"]
    assert index_main(["--model", f"fafa:{hub}", *pictures]) == 0
    ours, theirs = (read_evaluation(folder / "evaluation.json") for folder in (Path("results/owner--name"), run))
    assert ours["metrics"] == theirs["metrics"] and ours["fingerprint"] == theirs["fingerprint"]
    assert train_main(train_flags(tmp_path / "out", "--resume-path", str(hub), "--num-epochs", "1")) == 0


def test_a_bare_file_needs_its_model_and_vocabulary(
    trained_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copy(trained_run / "saved_models" / NAME, tmp_path / "bare.pt"))
    command = ["convert", str(bare), "--to", "hub", "--out", str(tmp_path / "hub")]
    yaml = tmp_path / "model.yaml"
    yaml.write_text(
        (toy / "tiny.yaml").read_text(encoding="utf-8").replace("vocab.txt", "absent.txt"), encoding="utf-8"
    )
    for more, named in (
        ([], "--config"),
        (["--config", "pretrain"], "has another vit_width"),
        (["--config", str(yaml)], "--tokenizer"),
    ):
        assert model_main([*command, *more]) == 2
        assert named in capsys.readouterr().err and not (tmp_path / "hub").exists()
    assert model_main([*command, "--config", str(yaml), "--tokenizer", str(toy)]) == 0


def test_exported_encoders_give_the_features_of_torch(
    hub: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself fails below a cosine of 0.9999; other batches than the exported one are among those compared."""
    out = str(tmp_path / "onnx")
    assert model_main(["export", str(hub), "--onnx", "--int8", "--out", out, "--batch_size", "3"]) == 0
    shown = capsys.readouterr().out
    assert "image.onnx" in shown and "query.onnx" in shown
    model, run = Blip2FAFACPR.from_pretrained(hub), open_encoder(tmp_path / "onnx" / "query.onnx")
    images, captions = torch.rand(4, 3, 28, 28), ["a red coat", "blue", "the man now with a black bag", "white"]
    with torch.no_grad():
        expected = model.extract_features({"image": images, "text_input": captions}).multimodal_embeds
    tokens = model.tokenize(captions)
    found = run(images, tokens["input_ids"], tokens["attention_mask"])
    assert (
        expected is not None and (expected - expected.roll(1, 0)).abs().max() > 5e-4
    )  # nearly untrained, but not constant
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert bench_main(["--checkpoint", str(hub), "--onnx", out, "--itcpr-root", str(toy / "itcpr")]) == 0
    rows = [
        line.split("|")[2:4] for line in capsys.readouterr().out.splitlines() if "onnx" in line or "torch |" in line
    ]
    assert len(rows) == 3 and rows[0] == rows[1]
