"""Training under torchrun: two real processes that talk through gloo."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # torchrun starts three interpreters that import torch

PACKAGE = Path(__file__).resolve().parents[2]


def torchrun(flags: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(PACKAGE / "train.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=540,
    )


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_two_processes_train_resume_and_write_one_run(
    sampler: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
) -> None:
    flags = ["--batch_size", "4", "--sampler", sampler, "--num_instance", "2"]
    done = torchrun(train_flags(tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    log = (run / "train_log.txt").read_text(encoding="utf-8")
    assert "2 process(es)" in log
    assert log.count("Validation Results") == 2
    if sampler == "random":  # 24 captions in two shares of three batches of four
        assert "Iteration[3/3]" in log
        assert "Iteration[4" not in log
    last = torch.load(run / "last.pth", weights_only=True)
    assert len(last["rng"]) == 2
    assert not torch.equal(last["rng"][0]["torch"], last["rng"][1]["torch"])
    assert not any(name.startswith("module.") for name in last["model"])
    done = torchrun([*train_flags(tmp_path, *flags, "--num_epoch", "3"), "--resume"])
    assert done.returncode == 0, done.stderr
    assert torch.load(run / "last.pth", weights_only=True)["epoch"] == 3
    assert only_run(tmp_path) == run


def test_one_failing_process_ends_the_job(
    tmp_path: Path, train_flags: Callable[..., list[str]], second_process_raises: dict[str, str]
) -> None:
    """Process 1 raises in its second step; the other one sits in a collective that will never end."""
    began = time.monotonic()
    flags = train_flags(tmp_path / "logs", "--batch_size", "4", "--num_epoch", "1000")
    done = torchrun(flags, PYTHONPATH=second_process_raises["PYTHONPATH"])
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "rank one is lost" in done.stderr
    assert not list((tmp_path / "logs").glob("*/*/last.pth"))
    assert time.monotonic() - began < 300  # far below the two hours that a collective waits
