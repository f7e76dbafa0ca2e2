"""The launcher: how many processes on which GPUs, flags passed on, signals and exit statuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mra.launch import LaunchFolder, Plan, asked_world, choose_port, plan_processes, plan_sentence, supervise
from mra.launched import adopt_slurm
from mra.options import build_retrieval_parser, build_run_parser, retrieval_arguments
from tbps_common.errors import InputError


@pytest.mark.parametrize(
    ("dist", "gpus", "visible", "nproc", "expected"),
    [
        ("f4", 4, None, None, Plan(4, 4, "0,1,2,3")),
        ("f4", 8, None, None, Plan(4, 4, "0,1,2,3")),
        ("f4", 2, None, None, Plan(4, 2, "0,1")),
        ("f4", 0, None, None, Plan(4, 1, None)),
        ("f4", 0, None, 4, Plan(4, 4, None)),
        ("f4", 0, None, 6, Plan(6, 4, None)),
        ("f4", 8, None, 6, Plan(6, 6, "0,1,2,3,4,5")),
        ("f4", 1, None, 4, Plan(4, 1, "0")),
        ("f4", 6, "7,6,5,4,3,2", None, Plan(4, 4, "7,6,5,4")),
        ("f4", 2, "GPU-aa,MIG-bb", None, Plan(4, 2, "GPU-aa,MIG-bb")),
        ("gpu2", 4, None, None, Plan(1, 1, "2")),
        ("gpu1", 3, "5,6,7", None, Plan(1, 1, "6")),
        ("gpu3", 0, None, None, Plan(1, 1, None)),
        ("m0", 4, None, None, Plan(4, 4, "0,1,2,3", 2, 0)),
        ("m1", 2, None, None, Plan(4, 2, "0,1", 2, 1)),
        ("m1", 0, None, None, Plan(4, 1, None, 2, 1)),
    ],
)
def test_processes_fit_the_machine(
    dist: str, gpus: int, visible: str | None, nproc: int | None, expected: Plan
) -> None:
    assert plan_processes(dist, gpu_count=gpus, visible=visible, nproc=nproc, processors=4) == expected


def test_gpu_that_is_not_there_and_unknown_dist_are_named() -> None:
    with pytest.raises(InputError, match=r"gpu3 .* only 2 .*\(5, 6\)"):
        plan_processes("gpu3", gpu_count=2, visible="5,6")
    for dist in ("f3", "gpu4", "gpu", "", "F4"):
        with pytest.raises(ValueError, match="--dist"):
            plan_processes(dist, gpu_count=4)


def test_scores_are_combined_as_by_the_processes_asked_for() -> None:
    assert {dist: asked_world(dist) for dist in ("f4", "gpu0", "gpu3", "m0", "m1")} == {
        **{"f4": 4, "gpu0": 1, "gpu3": 1, "m0": 8, "m1": 8}
    }


def test_one_line_says_what_runs_instead() -> None:
    assert plan_sentence(Plan(4, 4, "0,1,2,3"), "f4", 40) is None
    said = plan_sentence(Plan(4, 2, "0,1"), "f4", 40)
    assert (
        said is not None
        and "4 process" in said
        and "running 2 on GPU 0,1" in said
        and "80 images instead of 160" in said
    )
    said = plan_sentence(Plan(4, 1, None), "f4", 40)
    assert said is not None and "on the CPU" in said and "\n" not in said
    said = plan_sentence(Plan(1, 1, None), "gpu0", 40)
    assert said is not None and "instead of" not in said


def test_every_flag_is_passed_on() -> None:
    words = [
        *("--task", "rstp", "--output_dir", "out dir/it's", "--checkpoint", "-odd name.pth", "--bs", "7", "--epo", "3"),
        *("--lr", "2e-5", "--seed", "9", "--evaluate", "--region", "0.5", "--score_world", "2", "--device", "cpu"),
        *("--resume", "--save_every", "11", "--num_workers", "2", "--select", "val", "--amp_eval", "--report"),
        *("--region_feat", "paper", "--gradient_checkpointing", "--log_every", "5", "--trust_checkpoint"),
        *("--bad_images", "skip", "--require_published", "0.2", "--grad_scaler", "--tf32"),
    ]
    words[words.index("--checkpoint") : words.index("--checkpoint") + 2] = ["--checkpoint=-odd name.pth"]
    given = build_run_parser().parse_args(words)
    passed = build_retrieval_parser().parse_args(retrieval_arguments(given, "configs/rstp.yaml"))
    launch_only = {"dist", "nproc", "master_addr", "master_port"}
    for name, value in vars(given).items():
        assert name in launch_only or getattr(passed, name) == value, name
    defaults = build_run_parser().parse_args([])
    assert all(value != getattr(defaults, name) for name, value in vars(given).items() if name not in launch_only)


def test_flags_have_the_released_names_types_and_defaults() -> None:
    defaults = vars(build_run_parser().parse_args([]))
    released = {
        **{"task": "sda", "dist": "f4", "output_dir": "out/pre_sda", "checkpoint": "data/checkpoint/pretrain.pth"},
        **{"bs": 0, "epo": 0, "lr": 0.0, "seed": 42, "evaluate": False, "region": 0.0},
    }
    assert {name: defaults[name] for name in released} == released
    needed = ["--config", "c", "--task", "cuhk", "--output_dir", "o"]
    defaults = vars(build_retrieval_parser().parse_args(needed))
    released = {
        **{"config": "c", "task": "cuhk", "output_dir": "o", "bs": 0, "epo": 0, "lr": 0.0, "seed": 42},
        **{"evaluate": False, "region": 0.0, "device": "cuda", "world_size": 1, "dist_url": "env://"},
        **{"distributed": True, "score_world": None},
    }
    assert {name: defaults[name] for name in released} == released
    for short in ("--re", "--reg", "--region"):
        assert build_retrieval_parser().parse_args([*needed, short, "0.8"]).region == 0.8
        assert build_run_parser().parse_args([short, "0.8"]).region == 0.8


def test_port_is_the_released_one_unless_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    args = build_run_parser().parse_args([])
    with socket.socket() as busy:
        try:
            busy.bind(("127.0.0.1", 3006))
        except OSError:
            pass  # somebody else has it, which is as good
        found = choose_port(args, Plan(4, 4, None))
        assert found not in (0, 3006)
        assert choose_port(args, Plan(4, 4, None, 2, 1)) == 3006  # two nodes must agree
        monkeypatch.setenv("MASTER_PORT", "4000")
        assert choose_port(args, Plan(4, 4, None)) == 4000
        assert choose_port(build_run_parser().parse_args(["--master_port", "5000"]), Plan(4, 4, None)) == 5000


def test_slurm_stands_for_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is written
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    adopt_slurm()
    assert "RANK" not in os.environ
    for name, value in (("PROCID", "5"), ("NTASKS", "8"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(InputError, match="MASTER_ADDR"):
        adopt_slurm()
    monkeypatch.setenv("MASTER_ADDR", "node0")
    adopt_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "3006"]


WORKER = """
import os, signal, sys, time
from mra.launch import LaunchFolder
launched = LaunchFolder.of_this_process()
rank = int(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
launched.announce(rank)
{body}
"""
# Stands for torchrun: two workers of its own, and the status 1 if any of them fails.
LAUNCHER = """
import subprocess, sys
workers = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(rank), "0"]) for rank in (0, 1)]
sys.exit(int(any([worker.wait() for worker in workers])))
"""


def start_supervisor(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A process that supervises `LAUNCHER`, as run.py supervises torchrun; prints the status in the end."""
    command = json.dumps([sys.executable, "-c", LAUNCHER, WORKER.format(body=body)])
    program = (
        "import json, os, sys\n"
        "from mra.launch import LAUNCH_FOLDER, LaunchFolder, Plan, supervise\n"
        f"folder = {str(tmp_path)!r}\n"
        f"print(supervise(json.loads({command!r}), {{**os.environ, LAUNCH_FOLDER: folder}}, Plan(2, 2, None), "
        "LaunchFolder(folder)))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def wait_for_workers(tmp_path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return LaunchFolder(tmp_path).processes()


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_signal_reaches_the_processes_themselves_and_their_status_is_returned(tmp_path: Path) -> None:
    """The workers end with 0 after saving, as torchrun is to see; the first one reports 143."""
    body = "if rank == 0: signal.signal(signal.SIGTERM, lambda *_: (launched.report(143), sys.exit(0)))\ntime.sleep(60)"
    supervisor = start_supervisor(tmp_path, body)
    processes = wait_for_workers(tmp_path)
    time.sleep(0.3)
    supervisor.send_signal(signal.SIGTERM)
    out, _ = supervisor.communicate(timeout=30)
    assert out.strip() == "143"
    assert all(gone(process) for process in processes)


def test_processes_stop_when_the_launcher_is_killed(tmp_path: Path) -> None:
    supervisor = start_supervisor(tmp_path, "time.sleep(60)")
    processes = wait_for_workers(tmp_path)
    supervisor.kill()
    supervisor.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while not all(gone(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("program", "status"), [("pass", 0), ("import sys; sys.exit(7)", 7), ("import os; os.abort()", 134)]
)
def test_exit_status_of_a_single_process_is_returned(program: str, status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program]
    assert supervise(command, dict(os.environ), Plan(1, 1, None), LaunchFolder(tmp_path)) == status
