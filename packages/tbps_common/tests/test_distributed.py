"""Several processes: who is who, collectives, and a job that ends when one process fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tbps_common.errors import InputError
from tbps_common.run.distributed import Ranks, barrier, broadcast_object, process_group


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone_by_default() -> None:
    ranks = Ranks.from_environment()
    assert ranks == Ranks(0, 1, 0)
    assert ranks.is_main and not ranks.distributed


def test_the_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks = Ranks.from_environment()
    assert ranks == Ranks(rank=5, world_size=8, local_rank=1)
    assert ranks.distributed and not ranks.is_main


@pytest.mark.parametrize(
    "variables", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}]
)
def test_contradicting_variables_are_named(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=next(iter(variables))):
        Ranks.from_environment()


def test_a_single_process_joins_nothing() -> None:
    with process_group(torch.device("cpu")) as ranks:
        assert not ranks.distributed
        assert not torch.distributed.is_initialized()
        barrier()
        assert broadcast_object({"a": 1}) == {"a": 1}


def test_more_processes_than_gpus_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1000")
    monkeypatch.setenv("RANK", "999")
    monkeypatch.setenv("LOCAL_RANK", "999")
    with pytest.raises(InputError, match="--nproc-per-node"), process_group(torch.device("cuda")):
        raise AssertionError("must not be entered")


def launch(folder: Path, body: str, processes: int = 2, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run `body` in several gloo processes that torchrun's variables describe."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "script.py"
    script.write_text(body, encoding="utf-8")
    children = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        children.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = []
    for child in children:
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
        done.append(subprocess.CompletedProcess(child.args, child.returncode, out, err))
    return done


def test_objects_reach_every_process_and_the_group_is_gone_afterwards(tmp_path: Path) -> None:
    body = (
        "import torch, time\n"
        "from tbps_common.run.distributed import barrier, broadcast_object, process_group\n"
        "with process_group(torch.device('cpu'), timeout_minutes=1) as ranks:\n"
        "    value = broadcast_object({'from': ranks.rank, 'path': 'run/ü'})\n"
        "    if ranks.is_main: time.sleep(0.3)\n"
        "    barrier()\n"
        "    print(value, ranks.world_size)\n"
        "print(torch.distributed.is_initialized())\n"
    )
    for done in launch(tmp_path, body):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["{'from': 0, 'path': 'run/ü'} 2", "False"]


def test_replaced_items_are_the_same_on_every_process(tmp_path: Path) -> None:
    body = (
        "import torch\n"
        "from tbps_common.run.distributed import gather_objects, process_group\n"
        "from tbps_common.errors import ImageError\n"
        "from tbps_common.run.batches import ReplacedItems\n"
        "def read(index):\n"
        "    if index in (1, 4): raise ImageError('bad')\n"
        "    return index\n"
        "print(gather_objects('alone'))\n"
        "with process_group(torch.device('cpu'), timeout_minutes=1) as ranks:\n"
        "    replaced = ReplacedItems(6)\n"
        "    print(replaced.load(1 + 3 * ranks.rank, read), gather_objects(ranks.rank))\n"
        "    print(replaced.report(str))\n"
    )
    for rank, done in enumerate(launch(tmp_path, body)):
        assert done.returncode == 0, done.stderr
        alone, read, sentence = done.stdout.splitlines()
        assert alone == "['alone']" and read == f"{(2, 5)[rank]} [0, 1]"
        assert sentence.startswith("2 of 6 training items") and sentence.endswith("1, 4")


def test_one_failing_process_ends_the_other_soon(tmp_path: Path) -> None:
    body = (
        "import time, torch\n"
        "from tbps_common.run.distributed import barrier, process_group\n"
        "with process_group(torch.device('cpu'), timeout_minutes=5) as ranks:\n"
        "    barrier()\n"
        "    if ranks.rank == 1: raise RuntimeError('rank one is broken')\n"
        "    before = time.monotonic()\n"
        "    try: barrier()\n"
        "    finally: print(time.monotonic() - before)\n"
    )
    main, broken = launch(tmp_path, body)
    assert main.returncode != 0 and broken.returncode != 0
    assert "rank one is broken" in broken.stderr
    assert float(main.stdout) < 30  # and not the five minutes a collective may take
