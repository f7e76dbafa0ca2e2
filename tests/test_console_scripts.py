"""Every console command answers --help quickly (nothing heavy is imported first) and refuses unknown flags."""

import subprocess
import sys
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "open_clip", "transformers", "diffusers", "matplotlib.pyplot")
MEMBERS = sorted(path.name for path in (Path(__file__).resolve().parents[1] / "packages").iterdir() if path.is_dir())
MEMBERS.append("tbps_world")


def console_scripts() -> list[EntryPoint]:
    found = []
    for member in MEMBERS:
        found += [entry for entry in distribution(member).entry_points if entry.group == "console_scripts"]
    return found


def run(entry: EntryPoint, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys\nfrom {entry.module} import {entry.attr} as main\ntry:\n    status = main({list(arguments)!r})\n"
        f"except SystemExit as stop:\n    status = stop.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nprint('HEAVY', heavy)\nsys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("entry", console_scripts(), ids=lambda entry: entry.name)
def test_help_teaches_and_imports_nothing_heavy(entry: EntryPoint) -> None:
    result = run(entry, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower() and len(result.stdout) > 200
    assert "HEAVY []" in result.stdout


@pytest.mark.parametrize("entry", console_scripts(), ids=lambda entry: entry.name)
def test_unknown_flags_are_refused_without_a_traceback(entry: EntryPoint) -> None:
    result = run(entry, "--no_such_flag_at_all")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and result.stderr.strip()
