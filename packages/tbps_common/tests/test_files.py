"""Files are whole or not there."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tbps_common.files import atomic_path, write_json, write_text


def test_the_file_appears_with_its_folder_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "first\nzweite Zeile: ü\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "first\nzweite Zeile: ü\n".encode()
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_the_temporary_file_keeps_the_suffix_and_is_hidden(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png" and temporary.name.startswith(".") and temporary.parent == tmp_path
        temporary.write_bytes(b"x")


def test_one_writer_of_many_files_lists_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".x.tmp.txt").write_text("left by a kill", encoding="utf-8")
    with monkeypatch.context() as patch:
        for listing in ("listdir", "scandir"):
            patch.setattr(os, listing, lambda *_: pytest.fail("a folder of many files would be listed"))
        write_text(tmp_path / "x.txt", "new", one_writer=True)
    assert os.listdir(tmp_path) == ["x.txt"] and (tmp_path / "x.txt").read_text(encoding="utf-8") == "new"
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x.txt", one_writer=True) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x.txt"] and (tmp_path / "x.txt").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path, failure: type[BaseException]) -> None:
    write_text(tmp_path / "x", "old")
    with pytest.raises(failure), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half of the n", encoding="utf-8")
        raise failure
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_json_keeps_other_scripts_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "行人"})
    assert "行人" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"name": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "行人"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_text(target, "n" * (1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert target.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "0" * 200_000)
    code = (
        "import sys; from tbps_common.files import write_text\n"
        "print('ready', flush=True)\n"
        "for n in range(10**9): write_text(sys.argv[1], str(n % 10) * 200_000)\n"
    )
    for delay in (0.002, 0.011, 0.023):
        child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        text = target.read_text(encoding="utf-8")
        assert len(text) == 200_000 and len(set(text)) == 1


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.tmp{dead.pid}.bin").write_bytes(b"left over")
    (tmp_path / f".x.tmp{os.getppid()}.bin").write_bytes(b"being written")
    (tmp_path / f".y.tmp{dead.pid}.bin").write_bytes(b"of another target")
    with atomic_path(tmp_path / "x.bin") as temporary:
        temporary.write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == [f".x.tmp{os.getppid()}.bin", f".y.tmp{dead.pid}.bin", "x.bin"]


def test_what_safetensors_left_when_it_was_killed_is_removed_an_hour_later(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmpAb12Cd", tmp_path / ".tmpEf34Gh"
    for file in (old, young):
        file.write_bytes(b"part")
    os.utime(old, (0, 0))
    for name in ("log.txt", "weights.safetensors"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_bytes(b"whole")
        assert old.exists() == (name == "log.txt")
    assert young.exists()


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "x.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "x.bin")
