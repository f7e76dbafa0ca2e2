"""What a command prints and returns when something goes wrong."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tbps_common.errors import CheckpointError, DatasetError, GalleryError, InputError
from tbps_common.run.command import command


def failing(error: BaseException):
    @command
    def entry(argv: list[str]) -> int:
        raise error

    return entry


@pytest.mark.parametrize("kind", [InputError, DatasetError, CheckpointError, GalleryError])
def test_a_users_mistake_is_one_line_and_status_2(kind: type[InputError], capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(kind("reid_raw.json is missing; check --root_dir"))([]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: reid_raw.json is missing; check --root_dir\n")


class _Broken:
    """A data set whose only image is damaged."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise DatasetError("imgs/1.jpg is no image: replace it")


def test_a_loader_process_s_error_is_the_same_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def entry(argv: list[str]) -> int:
        from torch.utils.data import DataLoader

        return len(list(DataLoader(_Broken(), num_workers=1)))

    assert entry([]) == 2
    assert capsys.readouterr().err == "error: imgs/1.jpg is no image: replace it\n"


def test_a_full_disk_names_the_file_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(OSError(errno.ENOSPC, "No space left on device", "run/last.pth"))([]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "run/last.pth" in err and "free some space" in err


def test_an_unexpected_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ZeroDivisionError("division by zero\nsecond line"))([]) == 1
    err = capsys.readouterr().err
    assert err == "error: ZeroDivisionError: division by zero (run again with --debug for the traceback)\n"


def test_a_file_in_the_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way", encoding="utf-8")

    @command
    def make(argv: list[str]) -> int:
        Path(argv[0]).mkdir(parents=True, exist_ok=True)
        return 0

    for name in ("out", "out/run"):
        assert make([str(tmp_path / name)]) == 1
        message = capsys.readouterr().err
        assert str(tmp_path / "out") in message and "a file stands where a folder is needed" in message


def test_interruption_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    @command
    def entry(argv: list[str]) -> int:
        seen.extend(argv)
        raise InputError("wrong")

    assert entry(["--seed", "1", "--debug"]) == 2
    assert seen == ["--seed", "1"]
    assert "Traceback" in capsys.readouterr().err


def test_the_environment_asks_for_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TBPS_DEBUG", "1")
    failing(InputError("wrong"))([])
    assert "Traceback" in capsys.readouterr().err


def test_one_of_several_processes_shows_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failing(RuntimeError("boom"))([]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_success_is_status_0_and_statuses_pass_through() -> None:
    assert command(lambda argv: None)([]) == 0
    assert command(lambda argv: 3)([]) == 3


def test_a_closed_pipe_is_silent() -> None:
    code = (
        "import sys; from tbps_common.run.command import command\n"
        "@command\n"
        "def main(argv):\n"
        "    for n in range(100_000): print('line', n)\n"
        "sys.exit(main([]))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 1
    assert err == ""


@pytest.mark.parametrize(
    ("set_by_user", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "1000"}, None)],
)
def test_waiting_threads_sleep_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, set_by_user: dict[str, str], policy: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    seen: list[str | None] = []
    assert command(lambda argv: seen.append(os.environ.get("OMP_WAIT_POLICY")))([]) == 0
    assert seen == [policy]


def test_waiting_threads_are_left_alone_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/nvidiactl")
    assert command(lambda argv: None)([]) == 0
    assert "OMP_WAIT_POLICY" not in os.environ
