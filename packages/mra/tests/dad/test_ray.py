"""`--ray local`: the shards of a stage as tasks of a cluster of two processes, one of which is killed in mid-shard."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mra.cli import dad_main
from tbps_common.pipeline import read_stage

PICTURES = 80


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures as `mra-dad generate` leaves them, large enough for a shard to take some seconds."""
    noise = np.random.default_rng(0)
    images = tmp_path / "images" / "c_0_5000"
    images.mkdir(parents=True)
    records = []
    for number in range(PICTURES):
        grey = noise.integers(0, 255, (1100, 800, 1), dtype=np.uint8)
        pixels = np.repeat(grey, 3, axis=2) if number % 5 == 0 else grey ^ np.array([0, 90, 200], np.uint8)
        Image.fromarray(pixels).save(images / f"{number}_0.jpg")
        records.append({"image": f"c_0_5000/{number}_0.jpg", "index": number, "variant": 0, "prompt": "a man"})
    for work in ("alone", "cluster"):
        (tmp_path / work).mkdir()
        (tmp_path / work / "generated.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def flags(folder: Path, work: str, *more: str) -> list[str]:
    places = ["--work", str(folder / work), "--images", str(folder / "images")]
    return ["filter", *places, "--pose_model", "none", "--device", "cpu", "--batch_size", "1", *more]


def settled(folder: Path, shard: int) -> int:
    files = folder.glob(f"cluster/filtered.{shard}-of-2.jsonl*.jsonl*")
    own = folder / f"cluster/filtered.{shard}-of-2.jsonl"
    return sum(
        len(file.read_bytes().splitlines()) for file in {own, *files} if file.suffix == ".jsonl" and file.exists()
    )


def processes_of_shard(shard: int, session: int) -> list[int]:
    """Processes of Ray below the process `session` that work on a shard; Ray names them after the task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            same = (folder / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::shard %d/2" % shard) and b"TBPS_TEST_RUN=%d\0" % session in same + b"\0":
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes under /proc")
def test_a_killed_process_of_a_cluster_loses_nothing(folder: Path) -> None:
    assert dad_main(flags(folder, "alone")) == 0
    run = os.getpid()
    command = flags(folder, "cluster", "--ray", "local", "--ray_shards", "2")
    driver = subprocess.Popen(
        [sys.executable, "-c", "import sys; from mra.cli import dad_main; sys.exit(dad_main(sys.argv[1:]))", *command],
        env={**os.environ, "TBPS_TEST_RUN": str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while driver.poll() is None and settled(folder, 2) < 2:
        time.sleep(0.002)
    (victim,) = processes_of_shard(2, run)
    os.kill(victim, signal.SIGKILL)
    before = settled(folder, 2)
    said, _ = driver.communicate(timeout=300)
    assert before < PICTURES // 2, "the shard had ended before its process was killed"
    assert driver.returncode == 0, said
    alone, cluster = (read_stage(folder / work, "filtered") for work in ("alone", "cluster"))
    assert sorted(cluster, key=lambda record: record["index"]) == alone
    dropped = [
        sorted(
            json.loads(line)["image"]
            for file in (folder / work).glob("*.dropped.jsonl")
            for line in file.read_text().splitlines()
        )
        for work in ("alone", "cluster")
    ]
    assert dropped[0] == dropped[1] != []


def test_ray_and_shard_exclude_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dad_main(flags(folder, "cluster", "--ray", "local", "--shard", "1/2")) == 2
    assert "leave out --shard" in capsys.readouterr().err


def test_a_cluster_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dad_main(flags(folder, "cluster", "--ray", "127.0.0.1:1")) == 2
    assert "--ray 127.0.0.1:1" in capsys.readouterr().err
