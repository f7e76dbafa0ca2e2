"""The evaluation command: tables, files, the sweep over rounds, several checkpoints."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diana import load_diana
from diana.cli import eval_main
from diana.data import build_eval_transform, load_annotations, load_dataset_config, render_dialogue
from diana.metrics import metric_eval
from diana.tokenizer import encode
from tbps_common.images import read_image
from tbps_common.report.evaluation import read_evaluation
from tbps_common.report.published import PublishedRow

LAYOUT = Path(__file__).resolve().parents[2] / "DiaNA"
CONFIG = LAYOUT / "eval" / "configs" / "dataset_config.yaml"
EvalFlags = Callable[..., list[str]]


@pytest.fixture
def eval_flags(data_root: Path, pretrained: Path) -> EvalFlags:
    """Flags of eval.sh for the pre-trained model, and more."""

    def flags(*more: str) -> list[str]:
        return [
            *("--pretrained", str(pretrained), "--dataset", "chatpedes", "--dataset_config_path", str(CONFIG)),
            *("--batch_size", "8", "--max_seq_length", "400", "--turn_limit", "-1", "--version", "customized"),
            *("--num_workers", "0", *more),
        ]

    return flags


def test_the_table_holds_the_numbers_of_a_direct_computation(
    eval_flags: EvalFlags, pretrained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert eval_main(eval_flags("--mode", "all", "--output_dir", str(tmp_path), "--pictures", "2")) == 0
    shown = capsys.readouterr().out
    model, tokenizer = load_diana(pretrained)
    meta = load_dataset_config(CONFIG, "chatpedes")
    view = load_annotations(meta, "test")
    transform = build_eval_transform(model.config.image_size, meta["mean"], meta["std"])
    with torch.no_grad():
        pixels = torch.stack([transform(read_image(path)) for path in view["images"]])
        image, image_tokens = model.encode_image(pixels)
        tokens = encode(tokenizer, [render_dialogue(chat) for chat in view["chats"]], 400)
        text, text_tokens = model.encode_text(**tokens)
        score = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
        local = model.refine_sim(model.refine(text_tokens, tokens["attention_mask"]), model.refine(image_tokens))
    expected = {
        mode: metric_eval(sim, view["image_ids"], view["caption_ids"])
        for mode, sim in {"global": score, "local": local, "all": score + local}.items()
    }
    assert f"There are {len(view['images'])} images." in shown
    assert "Evaluate the 1/1-th model.\nRunning evaluation under 'round=-1' with model" in shown
    for mode, metrics in expected.items():
        row = " *\\| *".join(f"{metrics[name]:.2f}" for name in ("r1", "r5", "r10", "mAP", "mfr"))
        assert len(re.findall(rf"\| +- +\| +{mode} +\| +{row} *\| 20\d\d-", shown)) == 2, (mode, shown)
    assert shown.index("Best metrics:") < shown.index("wrote ")
    (entry,) = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert list(entry) == [
        *(
            "pretrained",
            "steps",
            "dataset",
            "split",
            "turn_limit",
            "num_images",
            "num_queries",
            "num_skipped",
            "metrics",
        ),
    ]
    assert entry["steps"] is None
    assert entry["metrics"] == {mode: pytest.approx(metrics, abs=1e-4) for mode, metrics in expected.items()}
    evaluation = read_evaluation(tmp_path / "evaluation.json")
    assert evaluation["metrics"]["all"]["mFR"] == pytest.approx(expected["all"]["mfr"], abs=1e-4)
    assert evaluation["counts"] == {"queries": len(view["chats"]), "gallery": len(view["images"])}
    for name in ("ranked_list.png", "cmc.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_a_sweep_gives_the_numbers_of_single_runs_and_a_curve(
    eval_flags: EvalFlags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["1", "3", "-1"]
    assert eval_main(eval_flags("--turn_limit", *limits, "--output_dir", str(tmp_path / "sweep"))) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"under 'round=(-?\d+)'", shown) == limits
    sweep = json.loads((tmp_path / "sweep" / "metrics.json").read_text(encoding="utf-8"))
    for limit, entry in zip(limits, sweep):
        flags = eval_flags("--turn_limit", limit, "--output_dir", str(tmp_path / limit), "--pictures", "0")
        assert eval_main(flags) == 0
        (alone,) = json.loads((tmp_path / limit / "metrics.json").read_text(encoding="utf-8"))
        assert alone["metrics"]["global"] == pytest.approx(entry["metrics"]["global"], abs=1e-4)
        assert alone["turn_limit"] == entry["turn_limit"] == int(limit)
    turns = json.loads((tmp_path / "sweep" / "turns.json").read_text(encoding="utf-8"))
    assert [point["rounds"] for point in turns] == [1, 3, 5]
    assert (tmp_path / "sweep" / "turns.png").stat().st_size > 1000
    names = {path.name for path in (tmp_path / "sweep").glob("evaluation_*")}
    assert names == {"evaluation_1_round_1.json", "evaluation_2_round_3.json", "evaluation_3_all_rounds.json"}


def test_several_checkpoints_are_sorted_by_their_steps(
    eval_flags: EvalFlags, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tmp_path / f"checkpoint-{steps}") for steps in (100, 9)]
    for folder in folders:
        shutil.copytree(pretrained / "checkpoint-3", folder)
    assert eval_main([*eval_flags(), "--pretrained", *folders]) == 0
    shown = capsys.readouterr().out
    assert shown.index("Evaluate the 1/2-th model.") < shown.index("checkpoint-9'") < shown.index("checkpoint-100'")
    best = shown[shown.index("Best metrics:") :]
    assert re.search(r"\| +9 +\| global", best)  # of equals the first


def test_an_output_folder_of_a_run_means_its_last_checkpoint(
    eval_flags: EvalFlags, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pretrained / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    assert eval_main([*eval_flags(), "--pretrained", str(tmp_path / "run")]) == 0
    assert eval_main(eval_flags()) == 0
    tables = re.findall(r"global \|(.*)\| 20", capsys.readouterr().out)
    assert len(set(tables)) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrained", "nowhere/at_all/x"], "nowhere/at_all/x does not exist"),
        (["--pretrained", ""], "--pretrained is missing"),
        (["--split", "val"], "val_annotation"),
        (["--dataset_config_path", "missing.yaml"], "missing.yaml"),
        (["--device", "tpu"], "--device tpu"),
        (["--output_dir", __file__], "is a file"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    more: list[str], message: str, eval_flags: EvalFlags, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_main([*eval_flags(), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "more", [["--turn_limit", "0"], ["--mode", "both"], ["--dataset", "cifar10"], ["--version", "v0"]]
)
def test_wrong_values_are_refused_by_the_parser(
    more: list[str], eval_flags: EvalFlags, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        eval_main([*eval_flags(), *more])
    assert stop.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_attributes_need_a_refiner(
    eval_flags: EvalFlags, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diana import DiaNAModel

    config = DiaNAModel.from_pretrained(pretrained).config
    config.refiner_config.update(enable=False, enable_refiner=False)
    DiaNAModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pretrained / name, tmp_path)
    flags = [*eval_flags(), "--pretrained", str(tmp_path)]
    assert eval_main([*flags, "--mode", "local"]) == 2
    assert "use --mode global" in capsys.readouterr().err
    assert eval_main(flags) == 0


def test_a_missing_image_is_told_before_the_model_is_loaded(
    world: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "ChatPedes", tmp_path / "ChatPedes")
    (tmp_path / "ChatPedes" / "imgs").rename(tmp_path / "ChatPedes" / "imgs00")
    monkeypatch.setenv("DIANA_DATA_ROOT", str(tmp_path))
    records = json.loads((tmp_path / "ChatPedes" / "test_reid.json").read_text(encoding="utf-8"))
    lost = tmp_path / "ChatPedes" / "imgs00" / records[0]["file_path"]
    lost.unlink()
    flags = ["--pretrained", str(pretrained), "--dataset_config_path", str(CONFIG)]
    assert eval_main(flags) == 2
    assert str(lost) in capsys.readouterr().err


def test_a_published_row_of_the_same_size_is_shown_and_can_be_required(
    eval_flags: EvalFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = eval_flags("--output_dir", str(tmp_path), "--pictures", "0", "--require_published", "0.2")
    assert eval_main(flags) == 1
    assert "nothing could be compared" in capsys.readouterr().out
    report = read_evaluation(tmp_path / "evaluation.json")
    sizes = report["counts"]["queries"], report["counts"]["gallery"]
    row = PublishedRow("chatpedes", "global", *sizes, report["metrics"]["global"], "a", "b", "made up")
    monkeypatch.setattr("diana.evaluate.PUBLISHED", [row])
    assert eval_main(flags) == 0
    assert "made up" in capsys.readouterr().out
    assert read_evaluation(tmp_path / "evaluation.json")["published"][0]["metrics"]["R1"]["queries"] == 0
