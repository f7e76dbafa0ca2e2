import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tbps_common.errors import InputError
from tbps_world.pretrain import commands
from tbps_world.toys.steps import RANDOM, StepFailed, call, echo, link_start, run_child, start_weights


def test_a_step_is_shown_and_its_status_passed_on(capsys):
    seen = []
    call("say", lambda words: seen.append(words) or 0, ["--text", "two words"])
    assert seen == [["--text", "two words"]]
    assert capsys.readouterr().out == "\n$ say --text 'two words'\n\n"
    with pytest.raises(StepFailed) as failure:
        call("say", lambda words: 3, [])
    assert failure.value.status == 3


def test_echo_names_the_folder(capsys):
    echo(["cd", "a b", "&&", "ls"], Path("x"))
    assert capsys.readouterr().out == "\n(in x) $ cd 'a b' && ls\n\n"


def train_nothing(folder, *, seed, steps):
    (folder / "weights").touch()
    return {}


def test_start_weights_are_trained_once_or_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(commands.MODELS, "nothing", f"{__name__}:train_nothing")
    monkeypatch.chdir(tmp_path)
    for said in ("written to", "is there"):
        folder = start_weights("nothing", "build/start")
        assert folder == tmp_path / "build/start/nothing" and (tmp_path / "build/start/nothing/weights").is_file()
        shown = capsys.readouterr().out
        assert "$ tbps-train-tiny nothing --out build/start" in shown and said in shown
    assert start_weights("nothing", "random") is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_child_that_fails(code, status):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StepFailed) as failure:
        run_child([sys.executable, "-c", code])
    assert failure.value.status == status
    assert signal.getsignal(signal.SIGTERM) == before


def test_weights_of_two_starts_do_not_mix(tmp_path):
    kept, place = tmp_path / "kept", tmp_path / "models" / "clip"
    kept.mkdir()
    assert not link_start("clip", RANDOM, place)
    place.parent.mkdir()
    place.symlink_to(kept)
    with pytest.raises(InputError, match="choose another --out"):
        link_start("clip", RANDOM, place)
    place.unlink()
    place.mkdir()
    assert not link_start("clip", RANDOM, place)
    with pytest.raises(InputError, match="choose another --out"):
        link_start("clip", str(tmp_path), place)


def test_a_child_that_succeeds(tmp_path):
    code = "import os, pathlib; pathlib.Path('here').write_text(os.environ['WORD'])"
    run_child([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "WORD": "yes"})
    assert (tmp_path / "here").read_text() == "yes"


PARENT = """
import sys
from tbps_world.toys.steps import StepFailed, run_child
child = (
    "import pathlib, signal, sys, time\\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\\n"
    "pathlib.Path(sys.argv[1]).touch()\\n"
    "time.sleep(60)"
)
try:
    run_child([sys.executable, "-c", child, sys.argv[1]])
except StepFailed as failure:
    sys.exit(failure.status)
"""


def test_sigterm_is_the_childs_to_handle(tmp_path):
    ready = tmp_path / "ready"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(ready)])
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 143
