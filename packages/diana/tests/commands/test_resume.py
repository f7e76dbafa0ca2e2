"""Interruption and resume: whatever ends a run, and whenever, going on ends in the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diana.cli import train_main

Flags = Callable[..., list[str]]

# Drop path, masking and random turns draw random numbers in every step.
RUN = ("--num_train_epochs", "2", "--drop_path_rate", "0.3", "--overwrite_output_dir", "False")


@pytest.fixture(scope="module")
def uninterrupted(
    world: Path, tmp_path_factory: pytest.TempPathFactory, train_flags: Flags, tiny: Path
) -> tuple[Path, list[str]]:
    """A fine-tuning run that nothing happened to (4 + 4 steps), and its flags without --output_dir."""
    out = tmp_path_factory.mktemp("whole")
    start = ["--pretrained", str(out / "start")]
    os.environ["DIANA_DATA_ROOT"] = str(world)
    try:
        assert train_main(train_flags("pretrain", out / "start", "--max_steps", "1", "--save_strategy", "no")) == 0
        assert train_main(train_flags("finetune", out / "run", *RUN, *start)) == 0
    finally:
        del os.environ["DIANA_DATA_ROOT"]
    return out / "run", [*RUN, *start]


def assert_same(one: Path, other: Path) -> None:
    """Equal weights to the last bit, and equal log lines but for time and speed."""
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    steps = [sorted(path.name for path in folder.glob("checkpoint-*"))[-1] for folder in (one, other)]
    assert steps[0] == steps[1]
    moments = [load_optimizer(folder / steps[0]) for folder in (one, other)]
    for mine, theirs in zip(*moments):
        assert torch.equal(mine, theirs)


def load_optimizer(folder: Path) -> list[torch.Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return [state[key][name] for key in sorted(state) for name in ("exp_avg", "exp_avg_sq")]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(("step", "number", "status"), [(2, signal.SIGTERM, 143), (4, signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_exactly(
    step: int,
    number: int,
    status: int,
    data_root: Path,
    uninterrupted: tuple[Path, list[str]],
    train_flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of an epoch, and at its last step."""
    from diana.train import DianaTrainer

    log = DianaTrainer.log

    def log_and_stop(self: DianaTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        log(self, logs, start_time)
        if "loss" in logs and self.state.global_step == step - 1:
            os.kill(os.getpid(), number)

    whole, run = uninterrupted
    flags = train_flags("finetune", tmp_path, *run)
    with monkeypatch.context() as patch:
        patch.setattr(DianaTrainer, "log", log_and_stop)
        assert train_main(flags) == status
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / ".unfinished").exists()
    assert train_main(flags) == 0
    assert_same(whole, tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_resuming_by_flag_needs_no_other_permission(
    data_root: Path, uninterrupted: tuple[Path, list[str]], train_flags: Flags, tmp_path: Path
) -> None:
    """--resume_from_checkpoint counts although the scripts say --overwrite_output_dir True."""
    whole, run = uninterrupted
    checkpoint = sorted(whole.glob("checkpoint-*"))[0]
    flags = train_flags("finetune", tmp_path, *run, "--overwrite_output_dir", "True")
    assert train_main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 0
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_killed_runs_go_on_exactly(
    script_environment: dict[str, str], uninterrupted: tuple[Path, list[str]], train_flags: Flags, tmp_path: Path
) -> None:
    """SIGKILL at random moments, often while a checkpoint is being written, until a run gets through."""
    whole, run = uninterrupted
    flags = [*train_flags("finetune", tmp_path, *run), "--save_strategy", "steps", "--save_steps", "1"]
    program = f"import sys; from diana.cli import train_main as main; sys.exit(main({flags!r}))"
    moments = random.Random(0)
    kills = 0
    for attempt in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            env=script_environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        unfinished = tmp_path / ".unfinished"
        before = {path.name for path in tmp_path.glob("checkpoint-*")}
        while child.poll() is None and not any(unfinished.glob("checkpoint-*")):
            time.sleep(0.002)
        if attempt % 2:  # after at least one more checkpoint, at any moment
            while child.poll() is None and {path.name for path in tmp_path.glob("checkpoint-*")} == before:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.15))
        if child.poll() is None and kills < 4:
            child.kill()
            kills += 1
        child.wait()
        for checkpoint in tmp_path.glob("checkpoint-*"):  # whatever has its final name is whole
            load_file(checkpoint / "model.safetensors")
            load_optimizer(checkpoint)
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if child.returncode == 0:
            break
    assert kills == 4
    assert_same(whole, tmp_path)


def test_an_earlier_run_is_replaced_when_the_new_one_has_a_checkpoint(
    data_root: Path, train_flags: Flags, tmp_path: Path
) -> None:
    assert train_main(train_flags("pretrain", tmp_path, "--max_steps", "5", "--save_strategy", "steps")) == 0
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    flags = train_flags("pretrain", tmp_path, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    assert train_main([*flags, "--save_total_limit", "2"]) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "notes.txt").exists()


def test_a_checkpoint_stands_before_what_it_replaces_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting an earlier run takes long, and a kill may come meanwhile."""
    from diana import checkpoints

    out, unfinished = tmp_path / "run", tmp_path / "run" / ".unfinished"
    replaced = [out / name for name in ("checkpoint-2", "checkpoint-9", "model.safetensors")]
    for folder in (*replaced[:2], unfinished / "checkpoint-2"):
        folder.mkdir(parents=True)
        (folder / "whose").write_text("new" if folder.parent == unfinished else "old", encoding="utf-8")
    replaced[2].write_bytes(b"old")
    standing = []
    delete = checkpoints.delete

    def watched(paths: list[Path]) -> None:
        standing.append(sorted(str(path.relative_to(out)) for path in out.glob("[a-z]*")))
        assert (out / "checkpoint-2" / "whose").read_text(encoding="utf-8") == "new"
        delete(paths)

    monkeypatch.setattr(checkpoints, "delete", watched)
    checkpoints.install_checkpoint(unfinished / "checkpoint-2", out, replaced=replaced, keep=None)
    assert standing == [["checkpoint-2"]]
    assert list(unfinished.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(
    data_root: Path, train_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    flags = train_flags("pretrain", tmp_path, "--overwrite_output_dir", "False")
    assert train_main(flags) == 2
    assert "is not empty and holds no checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["optimizer.pt", "trainer_state.json", "model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(
    damage: str,
    data_root: Path,
    pretrained: Path,
    train_flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(pretrained / "checkpoint-3", checkpoint)
    content = (checkpoint / damage).read_bytes()
    (checkpoint / damage).write_bytes(content[: len(content) // 2])
    flags = train_flags("pretrain", tmp_path / "out", "--resume_from_checkpoint", str(checkpoint))
    assert train_main(flags) == 2
    said = capsys.readouterr().err
    assert str(checkpoint) in said
    assert len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize(
    ("damage", "kept"), [("optimizer.pt", 0.5), ("model.safetensors", 0), ("trainer_state.json", 0)]
)
def test_a_damaged_last_checkpoint_is_passed_over(
    damage: str,
    kept: float,
    data_root: Path,
    uninterrupted: tuple[Path, list[str]],
    train_flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one before it is sound: the run goes on from there, in the same bits, and the damaged one does not stay."""
    whole, run = uninterrupted
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    sound, damaged = tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"
    content = (damaged / damage).read_bytes()
    (damaged / damage).write_bytes(content[: int(kept * len(content))])
    assert train_main(train_flags("finetune", tmp_path, *run, "--save_total_limit", "1")) == 0
    shown = capsys.readouterr().out
    (warning,) = (line for line in shown.splitlines() if line.startswith("warning"))
    assert str(damaged) in warning and f"resuming from {sound}" in warning
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    assert_same(whole, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(
    data_root: Path, train_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags("pretrain", tmp_path, "--max_steps", "20", "--learning_rate", "1e18", "--warmup_steps", "2")
    assert train_main([*flags, "--max_grad_norm", "1e30"]) == 1
    assert "not been a finite number since step" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


def test_a_learning_rate_that_would_not_count_is_refused(
    uninterrupted: tuple[Path, list[str]],
    world: Path,
    tmp_path: Path,
    train_flags: Flags,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, flags = uninterrupted
    monkeypatch.setenv("DIANA_DATA_ROOT", str(world))
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = (out / "arguments.json").read_bytes()
    longer = train_flags("finetune", out, *flags, "--resume_from_checkpoint", "True", "--learning_rate", "0.25")
    assert train_main(longer) == 2
    assert "--learning_rate was" in capsys.readouterr().err and (out / "arguments.json").read_bytes() == before
