"""Interruption and resume: whatever ends a run, and whenever, going on ends in the same bits."""

import multiprocessing
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mra import train as train_module
from mra.cli import retrieval_main

Flags = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]


class Killed(BaseException):
    """Ends a run in the test's own process, without any of its clean-up."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`kill_at(n)`: the n-th training step of this process raises instead of training."""

    def arm(number: int) -> None:
        calls = iter(range(1, 10_000))
        real = train_module.training_step

        def step(*arguments: Any) -> Any:
            if next(calls) == number:
                raise Killed
            return real(*arguments)

        monkeypatch.setattr(train_module, "training_step", step)

    return arm


@pytest.mark.parametrize(("task", "step"), [("cuhk", 1), ("cuhk", 4), ("cuhk", 9), ("sda", 4)])
def test_run_lost_in_mid_epoch_goes_on_bit_for_bit(
    task: str,
    step: int,
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    whole = trained
    if task != "cuhk":
        whole = tmp_path / "whole"
        assert retrieval_main(flags(task, whole, "--epo", "1", "--bs", "12")) == 0
    more = [] if task == "cuhk" else ["--epo", "1", "--bs", "12"]
    kill_at(step)
    with pytest.raises(Killed):
        retrieval_main(flags(task, tmp_path / "cut", "--save_every", "2", *more))
    monkeypatch.undo()
    monkeypatch.chdir(in_world)
    resume = ["--resume"] if (tmp_path / "cut" / "last.pth").exists() else []
    assert bool(resume) == (step > 2)
    assert retrieval_main(flags(task, tmp_path / "cut", *more, *resume)) == 0
    assert_same_run(tmp_path / "cut", whole)


def test_state_of_an_earlier_version_is_resumed(
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    """It stored the sums of the losses and one count in place of the meters."""
    kill_at(4)
    with pytest.raises(Killed):
        retrieval_main(flags("cuhk", tmp_path / "cut", "--save_every", "2"))
    monkeypatch.undo()
    monkeypatch.chdir(in_world)
    state = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)
    (meters,) = state["meters"]
    rate = meters["sums"].pop("lr")
    state["meters"] = [{"losses": meters["sums"], "rate": rate, "count": int(meters["weights"]["loss"])}]
    torch.save(state, tmp_path / "cut" / "last.pth")
    assert retrieval_main(flags("cuhk", tmp_path / "cut", "--resume")) == 0
    assert_same_run(tmp_path / "cut", trained)


@pytest.mark.parametrize("noted", [True, False])
def test_run_lost_between_training_and_evaluation_goes_on_with_the_evaluation(
    noted: bool,
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    with monkeypatch.context() as patch:

        def lost(*arguments: Any, **named: Any) -> Any:
            raise Killed

        patch.setattr(train_module, "evaluate_split", lost)
        with pytest.raises(Killed):
            retrieval_main(flags("cuhk", tmp_path / "cut"))
    state = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)
    progress = state["progress"]
    assert progress["trained"] and progress["batch"] == 6 and progress["epoch"] == 0
    # An earlier version did not note it when it was stopped after the last batch.
    progress["trained"] = noted
    torch.save(state, tmp_path / "cut" / "last.pth")
    assert retrieval_main(flags("cuhk", tmp_path / "cut", "--resume")) == 0
    assert_same_run(tmp_path / "cut", trained)


def test_finished_run_has_nothing_left_to_do(
    trained: Path, in_world: Path, tmp_path: Path, flags: Flags, assert_same_run: Callable[[Path, Path], None]
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    assert retrieval_main(flags("cuhk", tmp_path / "copy", "--resume")) == 0
    assert_same_run(tmp_path / "copy", trained)
    # More epochs can be asked for; the checkpoint's start file is not needed any more.
    more = ["--resume", "--epo", "3", "--checkpoint", "gone.pth"]
    assert retrieval_main(flags("cuhk", tmp_path / "copy", *more)) == 0
    assert len((tmp_path / "copy" / "log.txt").read_text().splitlines()) == 4
    assert "was" in (tmp_path / "copy" / "run.log").read_text()


@pytest.mark.parametrize(
    ("signal_number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signal_to_run_py_saves_and_exits(
    signal_number: int,
    status: int,
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    start_script: Start,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    folder = tmp_path / "out"
    words = flags("cuhk", folder)
    run_flags = ["--task", "cuhk", *words[4:], "--dist", "gpu0", "--device", "cpu", "--score_world", "1"]
    process = start_script("run.py", run_flags, cwd=in_world)
    out = ""
    assert process.stdout is not None
    for line in process.stdout:
        out += line
        if "[2/6]" in line:
            process.send_signal(signal_number)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == status, out + rest + errors
    assert "Traceback" not in errors
    assert "resume with the same command and --resume" in rest
    stored = torch.load(folder / "last.pth", weights_only=True)["progress"]
    assert 0 < stored["batch"] <= 6 and stored["epoch"] == 0
    assert retrieval_main([*words, "--resume"]) == 0
    assert_same_run(folder, trained)


@pytest.mark.slow
def test_sigkill_at_random_moments_and_inside_saves_loses_nothing(
    trained: Path,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    folder = tmp_path / "out"
    words = flags("cuhk", folder, "--save_every", "1")
    context = multiprocessing.get_context("forkserver")  # a child starts at once: the server has imported everything
    context.set_forkserver_preload(["mra.launched", "transformers.models.bert.tokenization_bert"])
    moments = random.Random(0)
    kills = {"at a random moment": 0, "inside a save": 0}

    def finished() -> bool:
        path = folder / "last.pth"
        return path.exists() and torch.load(path, weights_only=True)["progress"]["epoch"] == 2

    def logged() -> int:
        return (folder / "run.log").stat().st_size if (folder / "run.log").exists() else 0

    for attempt in range(40):
        resume = ["--resume"] if (folder / "last.pth").exists() else []
        before = logged() if resume else 0
        child = context.Process(target=retrieval_main, args=([*words, *resume],))
        child.start()
        inside_save = attempt % 2 == 0
        while child.is_alive() and logged() == before:
            time.sleep(0.002)
        left_by_earlier_kills = set(folder.glob(".*.tmp*.pth"))
        deadline = time.monotonic() + (60 if inside_save else moments.uniform(0, 0.6))
        while child.is_alive() and time.monotonic() < deadline:
            if inside_save and set(folder.glob(".*.tmp*.pth")) - left_by_earlier_kills:
                break
            time.sleep(0.002)
        if child.is_alive():
            child.kill()
            kills["inside a save" if inside_save else "at a random moment"] += 1
        child.join()
        if finished() and kills["inside a save"] >= 3:
            break
    assert all(kills.values()), kills
    assert retrieval_main([*words, *(["--resume"] if (folder / "last.pth").exists() else [])]) == 0
    assert_same_run(folder, trained)
    assert not list(folder.glob(".*"))


def test_resume_that_would_see_other_batches_is_refused(
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kill_at(4)
    with pytest.raises(Killed):
        retrieval_main(flags("cuhk", tmp_path / "cut", "--save_every", "2"))
    monkeypatch.undo()
    monkeypatch.chdir(in_world)
    for more in (["--bs", "8"], ["--seed", "1"]):
        before = (tmp_path / "cut" / "last.pth").read_bytes()
        assert retrieval_main(flags("cuhk", tmp_path / "cut", "--resume", *more)) == 2
        assert "resume it with the same" in capsys.readouterr().err
        assert (tmp_path / "cut" / "last.pth").read_bytes() == before


def test_resume_on_another_data_set_is_refused_and_touches_nothing(
    trained: Path, in_world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert retrieval_main(flags("icfg", tmp_path / "run", "--resume", "--epo", "3")) == 2
    error = capsys.readouterr().err
    assert "belongs to a run on other data" in error and "cuhk_train.json" in error and "--output_dir" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("task", ["icfg", "rstp"])
def test_trained_model_is_trained_further_on_other_data(
    task: str, trained: Path, in_world: Path, tmp_path: Path, flags: Flags
) -> None:
    """From the weights of a training on cuhk; the heads of rstp have another form, and start anew."""
    start = ["--checkpoint", str(trained / "checkpoint_best.pth"), "--epo", "1", "--lr", "1e-30"]
    assert retrieval_main(flags(task, tmp_path / "out", *start)) == 0
    before = torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"]
    after = torch.load(tmp_path / "out" / "checkpoint_best.pth", weights_only=True)["model"]
    assert torch.equal(before["itm_head.0.weight"], after["itm_head.0.weight"])
    assert ("projections of another form" in (tmp_path / "out" / "run.log").read_text()) == (task == "rstp")


def test_nothing_is_saved_for_resuming_when_not_wanted(in_world: Path, tmp_path: Path, flags: Flags) -> None:
    assert retrieval_main(flags("cuhk", tmp_path / "out", "--save_every", "0", "--epo", "1")) == 0
    assert not (tmp_path / "out" / "last.pth").exists()
