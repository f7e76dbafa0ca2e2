"""Several processes: really started by `run.py`, through gloo on the CPU."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tbps_common.run.command import usable_processors

pytestmark = pytest.mark.slow  # torchrun starts interpreters that import torch

Flags = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def run(world: Path, start_script: Start) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(*flags, **environment)`: `run.py` in the world, on the CPU, to its end."""

    def call(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [*flags, "--device", "cpu", "--num_workers", "0", "--log_every", "1"]
        # Tests that run side by side would find the same port free.
        process = start_script("run.py", words, cwd=world, **{"MASTER_PORT": free_port(), **environment})
        out, errors = process.communicate(timeout=560)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    return call


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_processes_for_f4_on_the_cpu(run: Run, tmp_path: Path) -> None:
    done = run(
        *("--task", "cuhk", "--dist", "f4", "--nproc", "4", "--output_dir", str(tmp_path / "out")),
        *("--bs", "6", "--epo", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert "4 process(es)" in done.stdout
    processes = min(4, usable_processors())
    assert f"--nproc_per_node={processes}" in done.stdout
    assert "combined as by 4 process(es)" in done.stdout
    assert done.stdout.count("| epoch |") == 1  # one process talks
    last = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    assert len(last["rng"]) == processes
    assert not any(name.startswith("module.") for name in last["model"])
    entry = json.loads((tmp_path / "out" / "log.txt").read_text().splitlines()[0])
    assert float(entry["loss"]) > 0


def test_one_and_two_processes_agree(run: Run, tmp_path: Path) -> None:
    """The same global batch, weights that stay: the losses which the batch's division does not touch are the same.

    Not so the matching loss, whose negatives come from the process's own batch (as released); the projections of rstp
    have neither BatchNorm nor drop-out. The evaluation agrees in every figure.
    """
    entries, scores = [], []
    for processes, batch in ((1, 16), (2, 8)):
        folder = tmp_path / str(processes)
        common = ["--task", "rstp", "--dist", "f4", "--nproc", str(processes), "--output_dir", str(folder)]
        done = run(*common, "--bs", str(batch), "--epo", "1", "--lr", "1e-30")
        assert done.returncode == 0, done.stderr
        entries.append(json.loads((folder / "log.txt").read_text().splitlines()[0]))
        checkpoint = ["--evaluate", "--checkpoint", "data/checkpoint/ft_rstp.pth"]
        done = run(*common, *checkpoint, "--require_published", "0.2")
        assert done.returncode == 1 and "nothing could be compared" in done.stdout, done.stderr
        assert "Traceback" not in done.stderr and "Error" not in done.stderr
        scores.append(re.findall(r"\| +t2i \|.*", done.stdout))
    one, two = entries
    for name in ("loss_itc", "loss_mlm"):
        # log.txt has five decimals; the losses are of the order of 5.
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-6, abs=1.01e-5)
    assert {name: one[name] for name in ("R1", "R5", "R10", "mAP", "mINP")} == {
        name: two[name] for name in ("R1", "R5", "R10", "mAP", "mINP")
    }
    assert len(scores[0]) == 2 and scores[0] == scores[1]


def test_two_processes_resume_where_a_signal_stopped_them(
    run: Run, world: Path, tmp_path: Path, start_script: Start, assert_same_run: Callable[[Path, Path], None]
) -> None:
    common = ["--task", "cuhk", "--dist", "f4", "--nproc", "2", "--bs", "8", "--epo", "1"]
    whole = run(*common, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    words = [
        *common,
        "--output_dir",
        str(tmp_path / "cut"),
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--log_every",
        "1",
    ]
    process = start_script("run.py", words, cwd=world, MASTER_PORT=free_port())
    assert process.stdout is not None
    for line in process.stdout:
        if "[1/6]" in line:
            process.terminate()
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["progress"]["batch"] > 0
    done = run(*common, "--output_dir", str(tmp_path / "cut"), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_nodes_train_together(world: Path, tmp_path: Path, start_script: Start) -> None:
    """Both forms of `--dist` for two nodes, on one machine."""
    port, nodes = free_port(), []
    for node in ("m0", "m1"):
        words = ["--task", "cuhk", "--dist", node, "--nproc", "1", "--master_port", port, "--bs", "8", "--epo", "1"]
        words += ["--output_dir", str(tmp_path / node), "--device", "cpu", "--num_workers", "0"]
        nodes.append(start_script("run.py", words, cwd=world))
    outputs = [node.communicate(timeout=560) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 process(es)" in outputs[0][0] and "combined as by 8 process(es)" in outputs[0][0]
    assert (tmp_path / "m0" / "checkpoint_best.pth").is_file()
    assert not (tmp_path / "m1").exists()  # only the first process writes


def test_one_failing_process_ends_the_job(run: Run, tmp_path: Path, second_process_raises: dict[str, str]) -> None:
    """Process 1 raises in its second step; the other one sits in a collective that will never end."""
    began = time.monotonic()
    done = run(
        *("--task", "cuhk", "--dist", "f4", "--nproc", "2", "--output_dir", str(tmp_path / "out")),
        *("--bs", "8", "--epo", "1000"),
        PYTHONPATH=second_process_raises["PYTHONPATH"],
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "rank one is lost" in done.stderr
    assert time.monotonic() - began < 300  # far below the hour that a collective waits


def test_fault_of_the_user_keeps_its_status_through_the_launcher(run: Run, world: Path, tmp_path: Path) -> None:
    """A checkpoint of another model is noticed by the processes only."""
    done = run(
        *("--task", "cuhk", "--dist", "f4", "--nproc", "2", "--output_dir", str(tmp_path / "out")),
        *("--checkpoint", "data/swin_base_patch4_window7_224_22k.pth"),
    )
    assert done.returncode == 2
    assert "error: " in done.stderr and "swin_base_patch4_window7_224_22k.pth" in done.stderr
    assert not (tmp_path / "out").exists()
