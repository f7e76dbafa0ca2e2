"""Interruption and resume: whatever ends a run, and whenever, going on ends in the same bits."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fafa.cli import train_main
from fafa.optim import build_scheduler
from tbps_world.checks import assert_same, signal_at
from tbps_world.tiny.fafa import write_toy_data

EPOCHS = ("--num-epochs", "3", "--learning-rate", "1e-3", "--log-every", "1")


def assert_same_run(one: Path, other: Path) -> None:
    names = ["training_state/last.pt", "training_state/frozen.pt"]
    names += sorted(str(path.relative_to(other)) for path in (other / "saved_models").glob("*.pt"))
    for name in names:
        assert_same(torch.load(one / name, weights_only=True), torch.load(other / name, weights_only=True), name)
    for name in ("train_metrics.csv", "validation_metrics_by_step.csv", "validation_metrics_by_epoch.csv"):
        assert (one / name).read_text() == (other / name).read_text()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> Path:
    """A run that nothing happened to."""
    output_dir = tmp_path_factory.mktemp("whole")
    assert train_main(train_flags(output_dir, *EPOCHS)) == 0
    return only_run(output_dir)


@pytest.mark.parametrize(
    ("moment", "number", "status", "workers"),
    [
        ("step 0, lr", signal.SIGTERM, 143, "0"),
        ("step 5, lr", signal.SIGINT, 130, "1"),
        ("step 3, lr", signal.SIGTERM, 143, "0"),
        ("ITCPR validation, step 6", signal.SIGTERM, 143, "0"),
        ("step 7, lr", signal.SIGTERM, 143, "0"),
        ("ITCPR validation, epoch 1", signal.SIGTERM, 143, "0"),
    ],
    ids=["first step", "mid-epoch with a worker", "before a validation", "after one", "epoch's end", "its validation"],
)
def test_stopped_run_goes_on_exactly(
    moment: str,
    number: int,
    status: int,
    workers: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    uninterrupted: Path,
) -> None:
    flags = train_flags(tmp_path, *EPOCHS, "--num-workers", workers)
    with signal_at("fafa.train", moment, number):
        assert train_main(flags) == status
    run = only_run(tmp_path)
    assert train_main([*flags, "--resume", str(run)]) == 0
    assert only_run(tmp_path) == run
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_killed_run_goes_on_exactly(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path], uninterrupted: Path
) -> None:
    """SIGKILL at random moments, until a run gets through; the state is written after every step meanwhile."""
    flags = train_flags(tmp_path, *EPOCHS, "--save-state-every", "1")
    context = multiprocessing.get_context("forkserver")  # a child starts at once: the server has imported everything
    context.set_forkserver_preload(["fafa.train"])
    moments = random.Random(0)
    kills = 0
    while True:
        resumable = list(tmp_path.glob("*/training_state/last.pt"))
        if not resumable:  # a run that was killed before its first state has nothing to go on from
            for leftover in tmp_path.iterdir():
                shutil.rmtree(leftover)
        child = context.Process(target=train_main, args=([*flags, *(["--resume", "auto"] if resumable else [])],))
        child.start()
        if kills < 6:
            log = None
            while log is None and child.is_alive():  # into the training, not into its preparation
                log = next(iter(tmp_path.glob("*/train_log.txt")), None)
                time.sleep(0.01)
            time.sleep(moments.uniform(0.05, 0.8))
            if child.is_alive():
                os.kill(child.pid or 0, signal.SIGKILL)
                kills += 1
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert_same_run(only_run(tmp_path), uninterrupted)


def test_finished_run_has_nothing_left_to_do(
    tmp_path: Path, train_flags: Callable[..., list[str]], uninterrupted: Path
) -> None:
    run = tmp_path / uninterrupted.name
    shutil.copytree(uninterrupted, run)
    assert train_main([*train_flags(tmp_path, *EPOCHS), "--resume", "auto"]) == 0
    assert_same_run(run, uninterrupted)
    assert "all 3 epochs are done already" in (run / "train_log.txt").read_text(encoding="utf-8")


def test_resume_does_not_need_the_backbone_file(
    tmp_path: Path, train_flags: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """Everything a model is built from lies in the run directory."""
    run = tmp_path / uninterrupted.name
    shutil.copytree(uninterrupted, run)
    flags = train_flags(tmp_path, *EPOCHS, "--backbone", str(tmp_path / "gone.yaml"), "--resume", str(run))
    assert train_main(flags) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--batch-size", "8"), "--batch-size"),
        (("--seed", "1"), "--seed"),
    ],
)
def test_other_circumstances_are_refused(
    change: tuple[str, str],
    named: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = train_flags(tmp_path, *EPOCHS, *change, "--resume", str(uninterrupted))
    assert train_main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert named in line
    assert "--resume-path" in line


def test_the_remaining_steps_use_the_flags_given_now(
    tmp_path: Path, train_flags: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """More epochs at another rate: the schedule is the one that a new run with these flags would have from here on."""
    run = tmp_path / uninterrupted.name
    shutil.copytree(uninterrupted, run)
    before = (run / "train_log.txt").read_text(encoding="utf-8")
    more = ("--num-epochs", "5", "--learning-rate", "5e-4", "--log-every", "1", "--fda-k", "5", "--resume", str(run))
    assert train_main(train_flags(tmp_path, *more)) == 0

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = build_scheduler(optimizer, 5e-4, steps_per_epoch=4, epochs=5)
    rates = []
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        rates.append(f"{scheduler.get_last_lr()[0]:.3g}")
    log = (run / "train_log.txt").read_text(encoding="utf-8").removeprefix(before)
    assert re.findall(r"step (\d+), lr ([^,]+),", log) == [(str(step), rates[step]) for step in range(12, 20)]
    assert "--num-epochs 3 before, 5 now" in log and "--learning-rate 0.001 before, 0.0005 now" in log
    recorded = json.loads((run / "training_hyperparameters.json").read_text(encoding="utf-8"))
    assert (recorded["num_epochs"], recorded["learning_rate"], recorded["fda_k"]) == (5, 5e-4, 5)


@pytest.mark.parametrize(("what", "flag"), [("SynCPR", "--syncpr-data-path"), ("ITCPR", "--itcpr-root")])
def test_a_run_does_not_go_on_with_other_data(
    what: str,
    flag: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As many triplets, but others: the run stays as it is. A folder that was only moved is no other data."""
    write_toy_data(tmp_path / "data")
    same = ["--syncpr-data-path", str(tmp_path / "data" / "syncpr"), "--itcpr-root", str(tmp_path / "data" / "itcpr")]
    run = tmp_path / "out" / uninterrupted.name
    shutil.copytree(uninterrupted, run)
    assert train_main([*train_flags(tmp_path / "out", *EPOCHS, *same), "--resume", str(run)]) == 0
    name = {"SynCPR": "syncpr/SynCPR.json", "ITCPR": "itcpr/query.json"}[what]
    annotation = tmp_path / "data" / name
    annotation.write_text(annotation.read_text(encoding="utf-8").replace("red", "green"), encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train_main([*train_flags(tmp_path / "out", *EPOCHS, *same), "--resume", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert flag in line and "--resume-path" in line
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "another file"])
def test_damaged_states_are_named(
    damage: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / uninterrupted.name
    shutil.copytree(uninterrupted, run)
    state = run / "training_state" / "last.pt"
    if damage == "another file":
        shutil.copyfile(run / "saved_models" / "tuned_last_recall_at1.pt", state)
    else:
        state.write_bytes(state.read_bytes()[: 1000 if damage == "truncated" else 0])
    assert train_main([*train_flags(tmp_path, *EPOCHS), "--resume", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(state) in line
