"""The README's inference command: printed block, JSON with the authors' keys, our evaluation file and pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fafa.cli import infer_main
from fafa.data import GalleryDataset, ITCPRDataset, QueryDataset
from fafa.evaluation import compute_itcpr_val_metrics
from fafa.model import Blip2FAFACPR
from fafa.processors import BlipCaptionProcessor
from fafa.transforms import inference_transform, squarepad_transform_test, targetpad_transform
from tbps_common.report.evaluation import read_evaluation
from tbps_common.report.published import PublishedRow

NAME = "tuned_last_recall_at1.pt"


@pytest.fixture
def run(tmp_path: Path, trained_run: Path) -> Path:
    """A copy of the trained run, without what resuming needs."""
    return Path(
        shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("training_state", "train_log.txt"))
    )


def infer(run: Path, toy: Path, *more: str) -> int:
    """The README's inference command on the CPU."""
    flags = ["--exp-dir", str(run), "--model-name", NAME, "--itcpr-root", str(toy / "itcpr"), "--batch-size", "256"]
    return infer_main([*flags, "--device", "cpu", "--num-workers", "0", *more])


def expected_metrics(run: Path, toy: Path, transform: Any, k: int) -> tuple[float, ...]:
    """The same evaluation by the public functions."""
    model = Blip2FAFACPR.from_pretrained(str(run / "model_config.yaml")).eval()
    from fafa.checkpoint import load_checkpoint

    assert load_checkpoint(model, run / "saved_models" / NAME).missing_keys == []
    model.fda_k = k
    data = ITCPRDataset(toy / "itcpr", verbose=False)
    query, gallery = data.query, data.gallery
    return compute_itcpr_val_metrics(
        model,
        QueryDataset(query["instance_ids"], query["img_paths"], query["captions"], transform),
        GalleryDataset(gallery["instance_ids"], gallery["img_paths"], transform),
        {"eval": BlipCaptionProcessor()},
        soft=True,
        num_workers=0,
    )


def test_results_have_the_authors_keys_in_their_order(run: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(run, toy) == 0
    path = run / f"inference_results_{NAME}.json"
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    keys = "model dataset fda_k fda_alpha fd_margin recall_at_1 recall_at_5 recall_at_10 mAP".split()
    assert list(found) == keys
    assert text.startswith('{\n    "model": "tuned_last_recall_at1.pt",\n    "dataset": "itcpr",\n    "fda_k": 6,')
    measured = tuple(found[key] for key in keys[5:])
    assert measured == pytest.approx(expected_metrics(run, toy, squarepad_transform_test(28), 6), abs=1e-4)
    shown = capsys.readouterr().out
    for name, key in (("Recall@1", "recall_at_1"), ("Recall@10", "recall_at_10"), ("mAP", "mAP")):
        assert f"{name}: {found[key]:.4f}\n" in shown
    for line in ("fda_k = 6", "fda_alpha = 0.5", "fd_margin = 0.5", "Square pad preprocess pipeline is used"):
        assert line in shown
    evaluation = read_evaluation(run / "evaluation.json")
    assert evaluation["metrics"]["com"]["R1"] == found["recall_at_1"]
    assert evaluation["counts"] == {"queries": 4, "gallery": 5}
    assert evaluation["settings"]["fda_k"] == 6
    for name in ("cmc.png", "ranked_list.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("changed", "transform", "k"),
    [
        ({"transform": "resize"}, inference_transform(28), 6),
        ({"transform": "targetpad", "target_ratio": 1.6, "fda_k": 2}, targetpad_transform(1.6, 28), 2),
        ({"focal_gamma": 2.0, "use_focal": True, "rdrop_alpha": 1.0}, squarepad_transform_test(28), 6),
        ({"transform": None, "fda_k": None, "fda_alpha": None}, squarepad_transform_test(28), 6),
    ],
    ids=["resize", "targetpad", "unknown keys", "missing keys"],
)
def test_recorded_settings_decide_the_evaluation(
    changed: dict[str, Any], transform: Any, k: int, run: Path, toy: Path
) -> None:
    file = run / "training_hyperparameters.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}), encoding="utf-8")
    assert infer(run, toy) == 0
    found = json.loads((run / f"inference_results_{NAME}.json").read_text())
    assert found["mAP"] == pytest.approx(expected_metrics(run, toy, transform, k)[3], abs=1e-4)


def test_sweep_over_k_takes_one_pass(
    run: Path, toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    vit_states = Blip2FAFACPR.vit_states
    monkeypatch.setattr(Blip2FAFACPR, "vit_states", lambda self, image: calls.append(1) or vit_states(self, image))
    assert infer(run, toy, "--fda-k-sweep", "8", "1", "3") == 0
    assert len(calls) == 2  # one batch of queries, one of gallery images
    swept = json.loads((run / f"fda_k_sweep_{NAME}.json").read_text())
    assert list(swept) == ["1", "3", "8"]
    for k, metrics in swept.items():
        expected = expected_metrics(run, toy, squarepad_transform_test(28), int(k))
        assert [metrics[name] for name in ("R1", "R5", "R10", "mAP")] == pytest.approx(list(expected), abs=1e-4)
    assert "| fda_k |" in capsys.readouterr().out


def test_recorded_itcpr_root_is_the_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--exp-dir", str(run), "--model-name", NAME, "--device", "cpu", "--num-workers", "0"]
    assert infer_main(flags) == 0
    file = run / "training_hyperparameters.json"
    content = json.loads(file.read_text())
    del content["itcpr_root"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert infer_main(flags) == 2
    assert "--itcpr-root is needed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_cpu_is_used_and_said(run: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(run, toy, "--device", "cuda") == 0
    assert "no GPU can be used: computing on the CPU" in capsys.readouterr().out


def test_a_bare_download_needs_two_files_and_a_backbone(run: Path, toy: Path, tmp_path: Path) -> None:
    """Weights in safetensors, hyper-parameters of the published kind, the backbone by flag."""
    from safetensors.torch import save_file

    download = tmp_path / "download"
    (download / "saved_models").mkdir(parents=True)
    shutil.copyfile(run / "training_hyperparameters.json", download / "training_hyperparameters.json")
    weights = torch.load(run / "saved_models" / NAME, weights_only=True)["model"]
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, download / "saved_models" / "fafa.safetensors"
    )
    more = ("--exp-dir", str(download), "--model-name", "fafa.safetensors", "--backbone", str(toy / "tiny.yaml"))
    assert infer(run, toy, *more) == 0
    assert infer(run, toy) == 0
    left = json.loads((download / "inference_results_fafa.safetensors.json").read_text())
    right = json.loads((run / f"inference_results_{NAME}.json").read_text())
    assert left["mAP"] == right["mAP"]


def test_script_runs_as_the_readme_says(run: Path, toy: Path, start_script: Callable[..., Any]) -> None:
    flags = ["--exp-dir", str(run), "--model-name", NAME, "--itcpr-root", str(toy / "itcpr"), "--batch-size", "256"]
    script = start_script("inference_fafa.py", [*flags, "--device", "cpu"])
    shown, errors = script.communicate(timeout=300)
    assert script.returncode == 0, errors
    assert "Recall@1: " in shown


def test_a_published_row_of_the_same_size_is_shown_and_can_be_required(
    run: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(run, toy, "--require-published", "0.2") == 1
    assert "nothing could be compared" in capsys.readouterr().out
    report = read_evaluation(run / "evaluation.json")
    row = PublishedRow("ITCPR", "com", *report["counts"].values(), report["metrics"]["com"], "a", "b", "made up")
    monkeypatch.setattr("fafa.inference.PUBLISHED", [row])
    assert infer(run, toy, "--require-published", "0.2") == 0
    assert "made up" in capsys.readouterr().out
    assert read_evaluation(run / "evaluation.json")["published"][0]["metrics"]["R1"]["queries"] == 0
