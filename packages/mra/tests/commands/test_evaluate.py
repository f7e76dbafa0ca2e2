"""`--evaluate`: tables, files, and the rule that combines the scores."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mra.cli import retrieval_main
from tbps_common.report.evaluation import read_evaluation
from tbps_common.report.published import PublishedRow

TABLE = re.compile(
    r"### (val|test)_result:\n\+[-+]+\n\| task \|(?: +\w+ +\|){5}\n\+[-+]+\n\| +t2i \|((?: +\d+\.\d{3} +\|){5})"
)


def evaluated(shown: str) -> dict[str, list[float]]:
    return {split: [float(cell) for cell in row.strip("|").split("|")] for split, row in TABLE.findall(shown)}


@pytest.mark.parametrize(("task", "splits"), [("cuhk", ["val", "test"]), ("icfg", ["test"]), ("rstp", ["val", "test"])])
def test_tables_are_printed_and_only_the_configuration_is_written(
    task: str,
    splits: list[str],
    in_world: Path,
    tmp_path: Path,
    flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--evaluate", "--checkpoint", f"data/checkpoint/ft_{task}.pth"]
    assert retrieval_main(flags(task, tmp_path / "out", *more)) == 0
    shown = capsys.readouterr().out
    assert list(evaluated(shown)) == splits
    assert "combined as by 1 process(es)" in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_evaluation_needs_neither_start_weights_nor_wordnet_nor_training_data(
    world: Path,
    tmp_path: Path,
    flags: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder with links to what an evaluation may read, and nothing else."""
    for name in ("configs", "images"):
        (tmp_path / name).symlink_to(world / name)
    for name in ("finetune/cuhk_val.json", "finetune/cuhk_test.json", "bert-base-uncased/vocab.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).symlink_to(world / "data" / name)
    monkeypatch.chdir(tmp_path)
    for task, checkpoint in (("cuhk", "ft_cuhk"), ("sda", "pretrain")):
        more = ["--evaluate", "--checkpoint", str(world / f"data/checkpoint/{checkpoint}.pth")]
        assert retrieval_main(flags(task, "out", *more)) == 0
        assert list(evaluated(capsys.readouterr().out)) == ["val", "test"]


@pytest.mark.parametrize(("task", "split"), [("icfg", "test"), ("rstp", "val")])
def test_checkpoint_of_another_data_set_is_evaluated_as_it_was_trained(
    task: str,
    split: str,
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Zero-shot; the heads of rstp have another form. The files of the training stay as they are."""
    shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    checkpoint = tmp_path / "run" / "checkpoint_best.pth"
    more = ["--evaluate", "--report", "--checkpoint", str(checkpoint)]
    assert retrieval_main(flags(task, tmp_path / "run", *more)) == 0
    rows = evaluated(capsys.readouterr().out)
    folder = tmp_path / "run" / f"zero_shot_{task}"
    report = read_evaluation(folder / f"evaluation_{split}.json")
    assert [round(report["metrics"]["t2i"][name], 3) for name in ("R1", "R5", "R10", "mAP", "mINP")] == rows[split]
    assert report["dataset"] == {"icfg": "ICFG-PEDES", "rstp": "RSTPReid"}[task]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    # Without its configuration nobody knows the form of a network that does not fit.
    torch.save(torch.load(checkpoint, weights_only=True)["model"], checkpoint)
    assert retrieval_main(flags(task, tmp_path / "bare", *more[:1], "--checkpoint", str(checkpoint))) == (
        2 if task == "rstp" else 0
    )


def test_reports_are_written_when_asked_for(
    in_world: Path, tmp_path: Path, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--evaluate", "--report", "--checkpoint", "data/checkpoint/ft_cuhk.pth", "--score_world", "4"]
    assert retrieval_main(flags("cuhk", tmp_path / "out", *more)) == 0
    rows = evaluated(capsys.readouterr().out)
    for split, row in rows.items():
        report = read_evaluation(tmp_path / "out" / f"evaluation_{split}.json")
        found = [round(report["metrics"]["t2i"][name], 3) for name in ("R1", "R5", "R10", "mAP", "mINP")]
        assert found == row
        assert report["settings"]["score_world"] == 4
        assert (tmp_path / "out" / f"ranked_list_{split}.png").is_file()


def test_a_published_row_of_the_same_size_is_shown_and_can_be_required(
    in_world: Path,
    tmp_path: Path,
    flags: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--evaluate", "--report", "--checkpoint", "data/checkpoint/ft_icfg.pth", "--require_published", "0.2"]
    assert retrieval_main(flags("icfg", tmp_path / "out", *more)) == 1
    assert "nothing could be compared" in capsys.readouterr().out
    report = read_evaluation(tmp_path / "out" / "evaluation_test.json")
    row = PublishedRow("ICFG-PEDES", "t2i", *report["counts"].values(), report["metrics"]["t2i"], "a", "b", "made up")
    monkeypatch.setattr("mra.evaluate.PUBLISHED", [row])
    assert retrieval_main(flags("icfg", tmp_path / "out", *more)) == 0
    assert "made up" in capsys.readouterr().out
