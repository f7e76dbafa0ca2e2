"""Several processes: the scripts' own launcher, two of them agree with one, and one that fails ends the job."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diana.cli import train_main

slow = pytest.mark.slow  # torchrun starts three interpreters that import torch

Flags = Callable[..., list[str]]
LAYOUT = Path(__file__).resolve().parents[2] / "DiaNA"


def run_script(
    script: str, environment: dict[str, str], *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"shell/{script}", *more],
        cwd=LAYOUT / "train",
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=540,
    )


@slow
def test_two_processes_agree_with_one(
    data_root: Path, script_environment: dict[str, str], train_flags: Flags, sizes: list[str], tmp_path: Path
) -> None:
    """Twice four samples are one batch of eight: the losses gather all rows, and the items are the same."""
    # Without momentum: Adam would turn the rounding noise of a gradient that is zero into whole steps.
    more = [
        "--max_steps",
        "6",
        "--drop_path_rate",
        "0",
        "--optim",
        "sgd",
        "--learning_rate",
        "1e-2",
        "--warmup_steps",
        "2",
    ]
    more += ["--dataloader_drop_last", "True"]
    more += ["--save_strategy", "steps", "--save_steps", "3"]
    assert train_main(train_flags("finetune", tmp_path / "one", *more, *_start(tmp_path, train_flags))) == 0
    done = run_script(
        "finetune.sh",
        script_environment,
        *sizes,
        *more,
        *("--per_device_train_batch_size", "4"),
        CPU_PROCESSES="2",
        MASTER_PORT="34917",
        OUTPUT_DIR=str(tmp_path / "two"),
        PRETRAINED=str(tmp_path / "start"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("There are") == 3  # the main process alone talks
    one, two = ([json.loads(line) for line in _log(tmp_path / name)] for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for mine, theirs in zip(one, two):
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-4 * abs(mine["loss"])
        assert mine["learning_rate"] == theirs["learning_rate"]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-5), name
    states = sorted(path.name for path in (tmp_path / "two" / "checkpoint-6").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.fixture(scope="module")
def pair(
    script_environment: dict[str, str], sizes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`pair(name, *flags, **variables)`: the folder of a fine-tuning by two CPU processes of the released script."""
    folder = tmp_path_factory.mktemp("pairs")
    alone = {**script_environment, "CPU_PROCESSES": "1", "OUTPUT_DIR": str(folder / "start")}
    started = run_script("pretrain.sh", alone, *sizes, "--max_steps", "1", "--save_strategy", "no")
    assert started.returncode == 0, started.stderr

    def run(name: str, *flags: str, **variables: str) -> Path:
        more = ["--max_steps", "4", "--drop_path_rate", "0", "--optim", "sgd", "--learning_rate", "1e-2"]
        more += ["--warmup_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", *flags]
        environment = {**script_environment, "CPU_PROCESSES": "2", "MASTER_PORT": "34921", **variables}
        places = {"OUTPUT_DIR": str(folder / name), "PRETRAINED": str(folder / "start")}
        done = run_script("finetune.sh", environment, *sizes, *more, **places)
        assert done.returncode == 0, done.stderr
        assert ("computing on the CPU in DeepSpeed" in done.stdout) == ("DS_ACCELERATOR" in variables), done.stdout
        return folder / name

    return run


@pytest.fixture(scope="module")
def unsharded(pair: Callable[..., Path]) -> Path:
    """The run whose weights lie whole on both processes, its schedule computed here."""
    return pair("unsharded")


def assert_agree(one: Path, two: Path, *, rates_ahead: int = 0) -> None:
    """The same losses, rates and weights; the second log is `rates_ahead` steps ahead with the rates it shows."""
    left, right = ([json.loads(line) for line in _log(folder)] for folder in (one, two))
    for mine, theirs in zip(left, right, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-4 * abs(mine["loss"])
    for mine, theirs in zip(left[rates_ahead:], right):
        assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"])
    left, right = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].shape == right[name].shape, name
        assert torch.allclose(left[name], right[name], atol=1e-5), name


@slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install 'packages/diana[deepspeed]'")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_shards_and_trains_the_same(stage: int, pair: Callable[..., Path], unsharded: Path) -> None:
    flags = ["--deepspeed", f"zero_stage{stage}_config.json"]
    assert_agree(unsharded, pair(f"zero{stage}", *flags, DS_ACCELERATOR="cpu"), rates_ahead=1)


@slow
def test_fsdp_shards_and_trains_the_same(pair: Callable[..., Path], unsharded: Path) -> None:
    assert_agree(unsharded, pair("fsdp", "--fsdp", "full_shard"))


def _start(folder: Path, train_flags: Flags) -> list[str]:
    """A model to start from."""
    assert train_main(train_flags("pretrain", folder / "start", "--max_steps", "1", "--save_strategy", "no")) == 0
    return ["--pretrained", str(folder / "start")]


def _log(folder: Path) -> list[str]:
    return (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()


@slow
def test_one_failing_process_ends_the_job(
    script_environment: dict[str, str], sizes: list[str], tmp_path: Path, second_process_raises: dict[str, str]
) -> None:
    """Process 1 raises in its second step; the other one sits in a collective that will never end."""
    began = time.monotonic()
    environment = {**script_environment, "CPU_PROCESSES": "2", "MASTER_PORT": "34918"}
    environment["PYTHONPATH"] = second_process_raises["PYTHONPATH"]
    done = run_script("pretrain.sh", environment, *sizes, OUTPUT_DIR=str(tmp_path / "out"))
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "rank one is lost" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert time.monotonic() - began < 300


def test_slurm_and_mpi_variables_become_torchruns() -> None:
    from diana.launch import adopt_launcher, first_host

    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-05,9],other",
    }
    adopt_launcher(slurm)
    assert {name: slurm[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "29500",
    }
    mpi = {
        "LAUNCHER": "mpi",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }
    adopt_launcher(mpi)
    assert (mpi["RANK"], mpi["WORLD_SIZE"], mpi["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    for alone in ({}, {"SLURM_PROCID": "0"}, {"LAUNCHER": "pytorch"}, {"RANK": "1", "WORLD_SIZE": "2"}):
        before = dict(alone)
        adopt_launcher(alone)
        assert alone == before
    assert [first_host(nodes) for nodes in ("a1", "a[1-2]", "a,b", "a[01,05]-x")] == ["a1", "a1", "a", "a01-x"]


@pytest.mark.parametrize(("visible", "left"), [(None, "0"), ("2,3", "2"), ("", ""), ("1", "1")])
def test_a_single_process_sees_one_gpu(visible: str | None, left: str) -> None:
    from diana.launch import use_one_gpu

    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    use_one_gpu(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": left}


@slow
def test_a_stop_of_the_job_saves_and_ends(script_environment: dict[str, str], sizes: list[str], tmp_path: Path) -> None:
    """SIGTERM to one of two processes: both save at the same step."""
    out = tmp_path / "out"
    environment = {
        **script_environment,
        **{"CPU_PROCESSES": "2", "MASTER_PORT": "34919", "OUTPUT_DIR": str(out), "PYTHONUNBUFFERED": "1"},
    }
    job = subprocess.Popen(
        ["bash", "shell/pretrain.sh", *sizes, "--num_train_epochs", "1000"],
        cwd=LAYOUT / "train",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("{'time'"):
            break
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), 15)
    shown, said = job.communicate(timeout=300)
    assert "stopped; resume with" in shown + said, said
    assert len(list(out.glob("checkpoint-*"))) == 1
    assert not (out / "model.safetensors").exists()
