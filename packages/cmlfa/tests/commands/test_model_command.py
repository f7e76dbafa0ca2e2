"""`tbps-model` on the files of CMLFA."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench_cmlfa_export import main as bench_main
from cmlfa import CMLFA, SimpleTokenizer, tokenize
from cmlfa.cli import test_main as run_test
from cmlfa.cli import train_main
from tbps_common.cli import index_main, model_main
from tbps_common.models.export import open_encoder
from tbps_common.models.source import find_model
from tbps_common.report.evaluation import read_evaluation
from tbps_common.run.checkpoint import load_checkpoint_file


def test_a_trained_run_and_its_start_file_are_recognised(
    trained_run: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, layout in ((trained_run / "best.pth", "checkpoint of CMLFA"), (tiny_clip, "CLIP with a ViT")):
        assert model_main(["inspect", str(file), "--json", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert found["paper"] == "CMLFA" and found["layout"].startswith(layout) and found["fits"] is True
    shown = capsys.readouterr().out
    assert "identities:  6\n" in shown and "1 layers, 64 wide, patch 16" in shown


def test_what_does_not_fit_is_named(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(trained_run / "best.pth", weights_only=True)["model"]
    state["safl.extra"] = state.pop("safl.pos_embeding")
    state["safl.feed.1.bias"] = torch.zeros(3)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "file.pth")
    assert model_main(["inspect", str(tmp_path / "file.pth"), "--no_checksum"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    for line in (
        "missing:     1: safl.pos_embeding",
        "unexpected:  1: safl.extra",
        "misshapen:   1: safl.feed.1.bias [3]",
    ):
        assert line in shown


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def hub(trained_run: Path, tmp_path: Path) -> Path:
    """The trained run in the layout of the hub."""
    folder = tmp_path / "hub"
    assert model_main(["convert", str(trained_run / "best.pth"), "--to", "hub", "--out", str(folder)]) == 0
    return folder


def test_conversion_to_the_hub_and_back_keeps_every_bit(hub: Path, trained_run: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == [
        *("README.md", "config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"),
    ]
    assert model_main(["inspect", str(hub), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["layout"].endswith(
        "in the layout of the hub"
    )
    assert model_main(["convert", str(hub), "--to", "official", "--out", str(tmp_path / "back.pth")]) == 0
    before = torch.load(trained_run / "best.pth", weights_only=True)["model"]
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True)["model"], before)
    model = CMLFA.from_pretrained(hub)
    assert same_bits(model.state_dict(), before) and not model.training
    model.save_pretrained(tmp_path / "again")
    assert same_bits(CMLFA.from_pretrained(tmp_path / "again").state_dict(), before)


def test_a_hub_folder_is_tested_and_trained_from_like_a_run(
    hub: Path, world: Path, trained_run: Path, train_flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The features are those of the run: same flags, same weights."""
    reports = [tmp_path / name for name in ("run", "hub", "config")]
    same = ["--root_dir", str(world), "--device", "cpu", "--num_workers", "0", "--test_batch_size", "8"]
    sources = (
        ["--config_file", str(trained_run / "configs.yaml")],
        ["--checkpoint", str(hub)],
        ["--config_file", str(hub / "config.json")],
    )
    for report, source in zip(reports, sources):
        assert run_test([*source, *same, "--report_dir", str(report)]) == 0
    first, *others = (read_evaluation(report / "evaluation.json") for report in reports)
    assert all(other["metrics"] == first["metrics"] for other in others)
    assert all(other["fingerprint"] == first["fingerprint"] for other in others)
    flags = train_flags(tmp_path / "out", "--pretrain_choice", str(hub), "--num_epoch", "1")
    assert train_main(flags) == 0


def test_the_card_names_data_command_metrics_and_citation(
    hub: Path, trained_run: Path, world: Path, tmp_path: Path
) -> None:
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert (
        "CUHK-PEDES" in card
        and "cmlfa-test --checkpoint" in card
        and "Not evaluated yet." in card
        and "Citation" in card
    )
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    flags = ["--config_file", str(run / "configs.yaml"), "--root_dir", str(world), "--report_dir", str(run)]
    assert run_test([*flags, "--checkpoint", str(run / "best.pth")]) == 0
    assert model_main(["convert", str(run / "best.pth"), "--to", "hub", "--out", str(tmp_path / "hub2")]) == 0
    measured = read_evaluation(run / "evaluation.json")["metrics"]["t2i"]["R1"]
    assert f"| t2i | {measured:.2f} |" in (tmp_path / "hub2" / "README.md").read_text(encoding="utf-8")


def test_transformers_reads_the_tokenizer_of_the_folder(hub: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(hub), SimpleTokenizer()
    for caption in ("A man in a red coat, walking.", "The woman's blue-white shoes; 2 bags!", "jekyll"):
        assert theirs(caption)["input_ids"] == [ours.sot_token_id, *ours.encode(caption), ours.eot_token_id]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.pth", "--to", "hub", "--out", "x"], "nowhere.pth does not exist"),
        (["{clip}", "--to", "hub", "--out", "x"], "is not a checkpoint of CMLFA, FAFA, MRA"),
        (["{best}", "--to", "official", "--out", "x.pth"], "is not in the layout of the hub"),
        (["{bare}", "--to", "hub", "--out", "x"], "--config"),
        (["{hub}", "--to", "hub", "--out", "x"], "is already in the layout of the hub"),
        (["{hub}", "--to", "official", "--out", "x.txt"], "must end in"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    arguments: list[str],
    named: str,
    hub: Path,
    trained_run: Path,
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = Path(shutil.copy(trained_run / "best.pth", tmp_path / "bare.pth"))
    monkeypatch.chdir(tmp_path)
    places = {"clip": tiny_clip, "best": trained_run / "best.pth", "bare": bare, "hub": hub}
    before = sorted(tmp_path.iterdir())
    assert model_main(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_nothing_is_fetched_for_a_name_that_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("tbps_common.models.source.fetch", lambda name, *_: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for source in ("logs/typo", "a/b.pth", "a/b/c", "best", "../x", "./x"):
        assert find_model(source, "--checkpoint") == source
    assert asked == []
    assert find_model("owner/name", "--checkpoint") == find_model("hf:owner/name", "--checkpoint") == str(tmp_path)
    assert asked == ["owner/name", "owner/name"]


def test_pushing_uploads_the_whole_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two calls that need a network are replaced."""
    sent: dict[str, list[str]] = {}

    def upload(_: Any, *, repo_id: str, folder_path: Path, **__: Any) -> str:
        sent[repo_id] = sorted(path.name for path in folder_path.iterdir())
        return "commit"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    assert CMLFA.from_pretrained(hub).push_to_hub("owner/name") == "commit"
    assert sent == {"owner/name": sorted(path.name for path in hub.iterdir())}


def test_exported_encoders_give_the_features_of_torch(
    hub: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself fails below a cosine of 0.9999; other batches than the exported one are among those compared."""
    out = tmp_path / "onnx"
    assert model_main(["export", str(hub), "--onnx", "--out", str(out), "--int8", "--batch_size", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("encoders.json", "image.int8.onnx", "image.onnx", "text.int8.onnx", "text.onnx"),
    ]
    assert "depends on the batch" in (out / "encoders.json").read_text(encoding="utf-8")
    assert "lowest cosine" in capsys.readouterr().out
    model = CMLFA.from_pretrained(hub)
    images = torch.rand(5, 3, 64, 32)
    texts = ("a man in red", "a woman", "blue shoes, a bag", "x", "y")
    ids = torch.stack([tokenize(text, SimpleTokenizer(), 20) for text in texts])
    for name, inputs, encode in (("image", images, model.encode_image), ("text", ids, model.encode_text)):
        with torch.no_grad():
            expected = torch.nn.functional.normalize(encode(inputs), dim=1)
        assert (expected - expected.roll(1, 0)).abs().max() > 1e-3
        torch.testing.assert_close(open_encoder(out / f"{name}.onnx")(inputs), expected, rtol=0, atol=1e-5)
        assert torch.cosine_similarity(open_encoder(out / f"{name}.int8.onnx")(inputs), expected).min() > 0.98
    capsys.readouterr()
    assert bench_main(["--checkpoint", str(hub), "--onnx", str(out), "--root_dir", str(world)]) == 0
    rows = [
        line.split("|")[2:4] for line in capsys.readouterr().out.splitlines() if "onnx" in line or "torch |" in line
    ]
    assert len(rows) == 3 and rows[0] == rows[1]


def test_only_a_hub_folder_is_exported(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_main(["export", str(trained_run), "--onnx", "--out", str(tmp_path / "onnx")]) == 2
    assert "tbps-model convert --to hub" in capsys.readouterr().err and not (tmp_path / "onnx").exists()


def test_a_name_on_the_hub_is_its_download(
    hub: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's own client finds the files in its cache; it is offline in these tests."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(hub, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    before = load_checkpoint_file(hub)["model"]
    assert same_bits(CMLFA.from_pretrained("owner/name", cache_dir=cache).state_dict(), before)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    flags = ["--root_dir", str(world), "--device", "cpu", "--num_workers", "0", "--report_dir", str(tmp_path / "out")]
    held = sorted(cache.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert run_test(["--checkpoint", "owner/name", *flags[:-2]]) == 0
    assert read_evaluation(tmp_path / "results" / "owner--name" / "evaluation.json")["metrics"]["t2i"]
    pictures = ["--images", str(world / "CUHK-PEDES" / "imgs"), "--out", "g.lance", "--device", "cpu"]
    assert index_main(["--model", "cmlfa:owner/name", *pictures]) == 0
    assert sorted(cache.rglob("*")) == held  # nothing of ours comes into the cache
    assert run_test(["--checkpoint", "owner/other", *flags]) == 2
    assert "--checkpoint owner/other is neither a folder nor could it be fetched" in capsys.readouterr().err
