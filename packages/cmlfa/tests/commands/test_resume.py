"""Interruption and resume: whatever ends a run, and whenever, going on ends in the same bits."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlfa.cli import train_main
from tbps_world.checks import assert_same, signal_at

# Without the MLM head a checkpoint has half the size; the masking of --MLM still draws its random numbers.
EPOCHS = ("--num_epoch", "3", "--batch_size", "6", "--loss_names", "sdm+itc+id")


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last.pth", "best.pth"):
        assert_same(torch.load(one / name, weights_only=True), torch.load(other / name, weights_only=True), name)
    assert results(one) == results(other)


def results(run: Path) -> list[str]:
    """The metric rows of the log; a killed run may have logged a row that is then logged again."""
    rows = [line for line in (run / "train_log.txt").read_text(encoding="utf-8").splitlines() if "t2i" in line]
    return rows[-1:]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> Callable[[str], Path]:
    """`uninterrupted(num_workers)`: a run that nothing happened to."""
    runs: dict[str, Path] = {}

    def run(num_workers: str) -> Path:
        if num_workers not in runs:
            output_dir = tmp_path_factory.mktemp("whole")
            assert train_main(train_flags(output_dir, *EPOCHS, "--num_workers", num_workers)) == 0
            runs[num_workers] = only_run(output_dir)
        return runs[num_workers]

    return run


@pytest.mark.parametrize(
    ("moment", "number", "status", "num_workers"),
    [
        ("Epoch[1] Iteration[1/", signal.SIGTERM, 143, "0"),
        ("Epoch[2] Iteration[3/", signal.SIGINT, 130, "2"),
        ("Epoch[2] Iteration[4/4]", signal.SIGTERM, 143, "0"),
        ("Epoch 2 done", signal.SIGTERM, 143, "0"),
    ],
    ids=["first step", "mid-epoch with workers", "last step of an epoch", "evaluation"],
)
def test_stopped_run_goes_on_exactly(
    moment: str,
    number: int,
    status: int,
    num_workers: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    flags = train_flags(tmp_path, *EPOCHS, "--num_workers", num_workers)
    with signal_at("IRRA.train", moment, number):
        assert train_main(flags) == status
    stored = torch.load(only_run(tmp_path) / "last.pth", weights_only=True)
    assert stored["iteration"] > 0
    assert train_main([*flags, "--resume"]) == 0
    assert_same_run(only_run(tmp_path), uninterrupted(num_workers))


@pytest.mark.parametrize(
    "moment", ["resuming from", "skipping the"], ids=["before the first step", "while passing over"]
)
def test_run_stopped_while_it_resumes_goes_on_exactly(
    moment: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    flags = train_flags(tmp_path, *EPOCHS, "--num_workers", "0")
    with signal_at("IRRA.train", "Epoch[2] Iteration[3/", signal.SIGTERM):
        assert train_main(flags) == 143
    with signal_at("IRRA.train", moment, signal.SIGTERM):
        assert train_main([*flags, "--resume"]) == 143
    assert train_main([*flags, "--resume"]) == 0
    assert_same_run(only_run(tmp_path), uninterrupted("0"))


def test_killed_run_goes_on_exactly(
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    uninterrupted: Callable[[str], Path],
) -> None:
    """SIGKILL at random moments and while a checkpoint is being written, until a run gets through."""
    flags = train_flags(tmp_path, *EPOCHS)
    context = multiprocessing.get_context("forkserver")  # a child starts at once: the server has imported everything
    context.set_forkserver_preload(["cmlfa.train"])
    moments = random.Random(0)
    parent = tmp_path / "CUHK-PEDES"
    kills = {"at a random moment": 0, "inside a save": 0}

    def finished() -> bool:
        files = list(parent.glob("*/last.pth"))
        return any(torch.load(path, weights_only=True)["epoch"] == 3 for path in files)

    def logged() -> int:
        return sum(path.stat().st_size for path in parent.glob("*/train_log.txt"))

    for attempt in range(40):
        resume = ["--resume"] if list(parent.glob("*/last.pth")) else []
        before = logged()
        child = context.Process(target=train_main, args=([*flags, *resume],))
        child.start()
        inside_save = attempt % 2 == 0
        while child.is_alive() and logged() == before:
            time.sleep(0.002)
        left_by_earlier_kills = set(parent.glob("*/.*.tmp*.pth"))
        deadline = time.monotonic() + (60 if inside_save else moments.uniform(0, 0.6))
        while child.is_alive() and time.monotonic() < deadline:
            if inside_save and set(parent.glob("*/.*.tmp*.pth")) - left_by_earlier_kills:
                break
            time.sleep(0.002)
        enough = kills["inside a save"] >= 3 and kills["at a random moment"] >= 2
        if child.is_alive() and not enough:
            child.kill()
            kills["inside a save" if inside_save else "at a random moment"] += 1
        child.join()
        for path in parent.glob("*/*.pth"):
            if not path.name.startswith("."):
                torch.load(path, weights_only=True)  # whatever has its final name is whole
        if finished() and enough:
            break
        if finished():  # through before it was killed often enough: once more from the beginning
            shutil.rmtree(parent)
    assert kills["inside a save"] >= 3
    assert kills["at a random moment"] >= 2
    (run,) = [path.parent for path in parent.glob("*/last.pth")]
    assert_same_run(run, uninterrupted("0"))


def test_resume_from_a_file_of_the_released_code_says_what_is_not_known(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    official = torch.load(trained_run / "last.pth", weights_only=True)
    for name in ("best_top1", "best_epoch", "rng"):
        del official[name]
    torch.save(official, tmp_path / "official.pth")
    flags = train_flags(tmp_path / "logs", "--num_epoch", "3")
    assert train_main([*flags, "--resume", "--resume_ckpt_file", str(tmp_path / "official.pth")]) == 0
    log = (only_run(tmp_path / "logs") / "train_log.txt").read_text(encoding="utf-8")
    assert "stores no best R1" in log
    assert "not exactly as it would have" in log
    assert "Epoch[3] Iteration[1/" in log
    assert "Epoch[2] Iteration" not in log


def test_what_a_killed_save_left_behind_is_removed(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]]
) -> None:
    run = tmp_path / "CUHK-PEDES" / trained_run.name
    shutil.copytree(trained_run, run)
    (run / ".last.tmp123.pth").write_bytes(b"half a check")
    assert train_main([*train_flags(tmp_path), "--resume"]) == 0
    assert not list(run.glob(".*"))


def test_own_run_is_continued_in_its_directory_and_needs_no_start_file(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]]
) -> None:
    run = tmp_path / "CUHK-PEDES" / trained_run.name
    shutil.copytree(trained_run, run)
    before = (run / "train_log.txt").read_text(encoding="utf-8")
    rate = torch.load(run / "last.pth", weights_only=True)["scheduler"]["_last_lr"][0]
    flags = train_flags(tmp_path, "--num_epoch", "3", "--pretrain_choice", str(tmp_path / "gone.pt"))
    assert train_main([*flags, "--resume", "--resume_ckpt_file", str(run / "last.pth")]) == 0
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    log = (run / "train_log.txt").read_text(encoding="utf-8")
    assert log.startswith(before)
    assert "Epoch[3] Iteration[3/3], loss: " in log[len(before) :]
    assert f"Base Lr: {rate:.2e}" in log[len(before) :]
    assert "--num_epoch was 2 when the run began, and is 3 now" in log
    stored = torch.load(run / "last.pth", weights_only=True)
    assert stored["epoch"] == 3
    assert stored["best_top1"] >= torch.load(trained_run / "last.pth", weights_only=True)["best_top1"]


def test_best_checkpoint_of_an_own_run_knows_its_score(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]]
) -> None:
    run = tmp_path / "CUHK-PEDES" / trained_run.name
    shutil.copytree(trained_run, run)
    best = torch.load(run / "best.pth", weights_only=True)
    assert set(best) == {"model", "optimizer", "scheduler", "num_epoch", "iteration", "epoch"}
    flags = train_flags(tmp_path, "--num_epoch", str(best["epoch"]))
    assert train_main([*flags, "--resume", "--resume_ckpt_file", str(run / "best.pth")]) == 0
    log = (run / "train_log.txt").read_text(encoding="utf-8")
    assert "stores no best R1" not in log
    assert "are done already" in log
    score = torch.load(run / "last.pth", weights_only=True)["best_top1"]
    assert log.splitlines()[-2].endswith(f"best R1: {score} at epoch {best['epoch']}")


def test_resume_alone_takes_the_newest_run_of_that_name(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]]
) -> None:
    parent = tmp_path / "CUHK-PEDES"
    for name in ("20200101_000000_cmlfa", "20200102_000000_cmlfa", "20200103_000000_big_cmlfa"):
        shutil.copytree(trained_run, parent / name)
    now = time.time()
    for age, name in enumerate(("20200103_000000_big_cmlfa", "20200101_000000_cmlfa", "20200102_000000_cmlfa")):
        os.utime(parent / name / "last.pth", (now - age, now - age))
    assert train_main([*train_flags(tmp_path), "--resume"]) == 0
    log = (parent / "20200101_000000_cmlfa" / "train_log.txt").read_text(encoding="utf-8")
    assert f"resuming from {parent / '20200101_000000_cmlfa' / 'last.pth'}: epoch 2 done" in log


def test_resume_without_a_checkpoint_names_where_it_looked(
    tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*train_flags(tmp_path), "--resume"]) == 2
    assert str(tmp_path / "CUHK-PEDES" / "*_cmlfa" / "last.pth") in capsys.readouterr().err
    missing = tmp_path / "nothing.pth"
    assert train_main([*train_flags(tmp_path), "--resume", "--resume_ckpt_file", str(missing)]) == 2
    assert str(missing) in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--lrscheduler", "cosine", "--warmup_epochs", "0"],
        ["--lrscheduler", "poly", "--warmup_epochs", "3", "--lr", "5e-4", "--target_lr", "1e-5"],
        ["--lrscheduler", "step", "--warmup_epochs", "1", "--milestones", "2", "3", "--bias_lr_factor", "3"],
    ],
    ids=["cosine", "another rate and warm-up", "other milestones"],
)
def test_remaining_epochs_use_the_rates_of_todays_flags(
    flags: list[str], tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """A run that is resumed with more epochs, or other flags, has from there on the rates of a fresh run with these."""
    common = ["--lr", "1e-3", "--eval_period", "9", "--loss_names", "sdm", "--batch_size", "24", "--optimizer", "SGD"]
    first = train_flags(tmp_path / "two", *common, "--warmup_epochs", "0", "--num_epoch", "2")
    longer = [*common, *flags, "--num_epoch", "4"]
    assert train_main(first) == 0
    assert train_main([*train_flags(tmp_path / "two", *longer), "--resume"]) == 0
    assert train_main(train_flags(tmp_path / "fresh", *longer)) == 0

    def stored(name: str) -> Any:
        return torch.load(only_run(tmp_path / name) / "last.pth", weights_only=True)

    def logged(name: str) -> list[str]:
        log = (only_run(tmp_path / name) / "train_log.txt").read_text(encoding="utf-8")
        return re.findall(r"Epoch\[[34]\].* Base Lr: (\S+)", log)

    assert len(logged("two")) == 2
    assert logged("two") == logged("fresh")
    assert stored("two")["scheduler"]["_last_lr"] == stored("fresh")["scheduler"]["_last_lr"]
    rates = [[group["lr"] for group in stored(name)["optimizer"]["param_groups"]] for name in ("two", "fresh")]
    assert rates[0] == rates[1]


def test_run_on_another_data_set_starts_from_the_weights_and_leaves_the_first_run_alone(
    trained_run: Path,
    other_world: Path,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "CUHK-PEDES" / trained_run.name
    shutil.copytree(trained_run, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    other = ["--dataset_name", "ICFG-PEDES", "--root_dir", str(other_world), "--num_epoch", "1"]
    best = str(run / "best.pth")
    assert train_main([*train_flags(tmp_path, *other), "--resume", "--resume_ckpt_file", best]) == 2
    told = capsys.readouterr().err
    assert "CUHK-PEDES" in told and f"--pretrain_choice {best}" in told

    # A learning rate of 0 shows what the run started from.
    assert train_main(train_flags(tmp_path / "new", *other, "--pretrain_choice", best, "--lr", "0")) == 0
    log = capsys.readouterr().out
    assert log.count("classifier.weight") == 1  # five persons instead of six
    found = torch.load(only_run(tmp_path / "new") / "last.pth", weights_only=True)["model"]
    start = torch.load(best, weights_only=True)["model"]
    assert all(torch.equal(found[name], start[name]) for name in start if not name.startswith("classifier."))
    assert len(found["classifier.weight"]) == 5 and len(start["classifier.weight"]) == 6
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
