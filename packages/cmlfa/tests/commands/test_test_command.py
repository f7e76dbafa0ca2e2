"""test.py: the table, the JSON and the pictures of a trained model."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlfa.cli import test_main as run_test
from tbps_common.report.evaluation import read_evaluation
from tbps_common.report.pictures import spread
from tbps_common.report.published import PublishedRow


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, moved away from the place its configuration names."""
    run = tmp_path / "moved"
    shutil.copytree(trained_run, run)
    config = run / "configs.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(trained_run), str(tmp_path / "gone")), encoding="utf-8")
    return run


def printed_metrics(run: Path) -> dict[str, list[str]]:
    log = (run / "test_log.txt").read_text(encoding="utf-8")
    return {
        row[0].strip(): [cell.strip() for cell in row[1].split("|")]
        for row in re.findall(r"\| +(t2i|i2t) +\|(.*)\|", log)
    }


def test_table_json_and_pictures_agree(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_test(["--config_file", str(own_run / "configs.yaml"), "--i2t"]) == 0
    report = read_evaluation(own_run / "evaluation.json")
    printed = printed_metrics(own_run)
    assert set(printed) == set(report["metrics"]) == {"t2i", "i2t"}
    for task, row in printed.items():
        assert row == [f"{report['metrics'][task][name]:.3f}" for name in ("R1", "R5", "R10", "mAP", "mINP")]
    assert report["counts"] == {"queries": 16, "gallery": 8}
    assert report["settings"]["test_batch_size"] == 512
    assert report["settings"]["lfa_attention"] == "batch"
    assert report["checkpoint"] == str(own_run / "best.pth")
    assert report["cmc"]["t2i"][0] == pytest.approx(report["metrics"]["t2i"]["R1"])
    for name in ("cmc.png", "ranked_list.png"):
        with Image.open(own_run / name) as picture:
            assert min(picture.size) > 200
    shown = capsys.readouterr().out
    assert "IRRA.eval" in (own_run / "test_log.txt").read_text(encoding="utf-8")
    assert all(str(own_run / name) in shown for name in ("evaluation.json", "cmc.png", "ranked_list.png"))


def test_log_is_appended_and_the_result_is_the_same(own_run: Path) -> None:
    for _ in range(2):
        assert run_test(["--config_file", str(own_run / "configs.yaml")]) == 0
    log = (own_run / "test_log.txt").read_text(encoding="utf-8")
    rows = re.findall(r"\| +t2i .*", log)
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_result_is_that_of_the_last_training_evaluation_in_the_same_batches(own_run: Path, trained_run: Path) -> None:
    """Evaluation during training and test.py differ in nothing but the batch size and the weights."""
    flags = ["--config_file", str(own_run / "configs.yaml"), "--test_batch_size", "8"]
    assert run_test([*flags, "--checkpoint", str(own_run / "last.pth")]) == 0
    row = re.findall(r"\| +t2i .*", (trained_run / "train_log.txt").read_text(encoding="utf-8"))[-1]
    assert row in (own_run / "test_log.txt").read_text(encoding="utf-8")


def test_start_file_is_not_needed_and_data_can_be_elsewhere(own_run: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "data")
    config = own_run / "configs.yaml"
    text = re.sub(
        r"pretrain_choice: .*", f"pretrain_choice: {tmp_path / 'gone.pt'}", config.read_text(encoding="utf-8")
    )
    config.write_text(text.replace(str(world), str(tmp_path / "nowhere")), encoding="utf-8")
    report = tmp_path / "report"
    flags = ["--config_file", str(config), "--root_dir", str(tmp_path / "data"), "--report_dir", str(report)]
    assert run_test(flags) == 0
    assert {path.name for path in report.iterdir()} == {"evaluation.json", "cmc.png", "ranked_list.png", "test_log.txt"}


def test_weights_alone_are_enough(own_run: Path) -> None:
    """Training heads may be absent when only evaluating; the features do not change."""
    flags = ["--config_file", str(own_run / "configs.yaml")]
    assert run_test(flags) == 0
    before = read_evaluation(own_run / "evaluation.json")
    heads = ("classifier.", "cross_", "ln_pre_", "ln_post.", "mlm_head.")
    state = torch.load(own_run / "best.pth", weights_only=True)["model"]
    torch.save({f"module.{k}": v for k, v in state.items() if not k.startswith(heads)}, own_run / "bare.pth")
    assert run_test([*flags, "--checkpoint", str(own_run / "bare.pth")]) == 0
    after = read_evaluation(own_run / "evaluation.json")
    assert after["metrics"] == before["metrics"]
    assert after["fingerprint"] == before["fingerprint"]


def test_without_a_configuration_the_runs_found_are_listed(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_test([]) == 2
    assert "train a model" in capsys.readouterr().err
    for name in ("20240101_000000_a", "20250101_000000_b"):
        (tmp_path / "logs" / "RSTPReid" / name).mkdir(parents=True)
        shutil.copy(own_run / "configs.yaml", tmp_path / "logs" / "RSTPReid" / name)
    assert run_test([]) == 2
    message = capsys.readouterr().err
    assert message.index("20250101_000000_b/configs.yaml") < message.index("20240101_000000_a/configs.yaml")


def test_missing_best_weights_point_to_the_last_ones(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_run / "best.pth").unlink()
    assert run_test(["--config_file", str(own_run / "configs.yaml")]) == 2
    assert f"--checkpoint {own_run / 'last.pth'}" in capsys.readouterr().err


def test_another_attention_axis_gives_another_result(own_run: Path) -> None:
    """The configuration decides the axis; a file of the released code, without that key, means `batch`."""
    config = own_run / "configs.yaml"
    fingerprints = []
    for text in ("", "lfa_attention: parts\n"):
        kept = [line for line in config.read_text(encoding="utf-8").splitlines(True) if "lfa_attention" not in line]
        config.write_text("".join(kept) + text, encoding="utf-8")
        assert run_test(["--config_file", str(config)]) == 0
        evaluation = read_evaluation(own_run / "evaluation.json")
        fingerprints.append((evaluation["settings"]["lfa_attention"], evaluation["fingerprint"]))
    assert [axis for axis, _ in fingerprints] == ["batch", "parts"]
    assert fingerprints[0][1] != fingerprints[1][1]


def test_another_data_set_is_tested_beside_the_results_of_the_first(own_run: Path, other_world: Path) -> None:
    flags = ["--config_file", str(own_run / "configs.yaml")]
    assert run_test(flags) == 0
    before = {path.name: path.read_bytes() for path in own_run.iterdir() if path.is_file()}
    assert run_test([*flags, "--dataset_name", "ICFG-PEDES", "--root_dir", str(other_world)]) == 0
    assert {path.name: path.read_bytes() for path in own_run.iterdir() if path.is_file()} == before
    report = read_evaluation(own_run / "ICFG-PEDES" / "evaluation.json")
    assert report["dataset"] == "ICFG-PEDES"
    assert {path.name for path in (own_run / "ICFG-PEDES").iterdir()} == {
        "evaluation.json",
        "cmc.png",
        "ranked_list.png",
        "test_log.txt",
    }


@pytest.mark.parametrize(("items", "count", "chosen"), [(10, 2, [2, 7]), (3, 5, [0, 1, 2]), (0, 2, []), (5, 1, [2])])
def test_spread_takes_evenly(items: int, count: int, chosen: list[int]) -> None:
    assert spread(range(items), count) == chosen


def test_a_published_row_of_the_same_size_is_shown_and_can_be_required(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config_file", str(own_run / "configs.yaml"), "--require_published", "0.2"]
    assert run_test(flags) == 1
    assert "nothing could be compared" in capsys.readouterr().out
    measured = read_evaluation(own_run / "evaluation.json")
    assert measured["published"] is None
    row = PublishedRow(measured["dataset"], "t2i", 16, 8, measured["metrics"]["t2i"], "a paper", "its own", "made up")
    for change, status in ((0.1, 0), (6.25, 1)):
        changed = {**row.metrics, "R1": row.metrics["R1"] + change}
        monkeypatch.setattr("cmlfa.evaluate.PUBLISHED", [replace(row, metrics=changed)])
        assert run_test(flags) == status
        (entry,) = read_evaluation(own_run / "evaluation.json")["published"]
        assert entry["metrics"]["R1"]["queries"] == (0 if status == 0 else -1)
        assert "a paper" in (own_run / "test_log.txt").read_text(encoding="utf-8")
