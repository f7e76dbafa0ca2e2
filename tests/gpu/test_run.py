"""`tests/gpu/run` on the CPU, at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run"


@pytest.mark.slow
def test_all_checks_pass_on_the_cpu_and_are_listed(tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--device", "cpu", "--parts", "checks", "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    kinds = [row["what"].partition(":")[2].split(",")[0].strip() for row in rows]
    assert kinds.count("features against the CPU") == 7 and kinds.count("training step") == 7
    assert all(row.get("ok", True) for row in rows) and "failed: none" in done.stdout


def test_parts_without_time_are_named_and_unknown_flags_refused(tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--device", "cpu", "--seconds", "0", "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    assert done.returncode == 0 and {row["left out"] for row in rows} == {"no time left"}
    assert [row["what"] for row in rows] == ["checks", "cmlfa", "fafa", "mra", "diana", "dp_gen", "tests"]
    wrong = subprocess.run([sys.executable, RUN, "--device", "cpu", "--wrong"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "unknown flags: --wrong" in wrong.stderr
