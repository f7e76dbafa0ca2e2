#!/usr/bin/env python3
"""Write requirements.txt, and its pins as `constraint-dependencies` of the root's pyproject.toml.

python3 .ci/pin.py                 after changing any dependency: versions that are pinned stay as they are
python3 .ci/pin.py 2026-12-31      upgrade: the newest versions of that day, which becomes `exclude-newer`
"""

import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT, REQUIREMENTS, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.txt", ROOT / "uv.lock"
EXPORT = ["uv", "export", "--quiet", "--all-packages", "--no-emit-workspace", "--no-header"]


def with_constraints(pyproject: str, pins: list[str]) -> str:
    """The text of pyproject.toml with these pins and no others."""
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    setting = f"constraint-dependencies = [\n{lines}]"
    text, found = re.subn(r"(?ms)^constraint-dependencies = \[\n.*?^\]", lambda _: setting, pyproject)
    if found != 1:
        sys.exit(f"{PYPROJECT} must hold one list of constraint-dependencies, with its brackets on lines of their own")
    return text


def pins_of(requirements: str) -> list[str]:
    """`name==version` of every requirement; with its marker where a package has several versions."""
    pins = re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)(?: ; (.*?))?(?: \\)?$", requirements)
    names = [name for name, _, _ in pins]
    return [f"{name}=={version}" + (f" ; {marker}" if names.count(name) > 1 else "") for name, version, marker in pins]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("date", nargs="?", type=date.fromisoformat, help="upgrade to the newest versions of this day")
    day = parser.parse_args().date
    before = PYPROJECT.read_text(encoding="utf-8")
    if day is not None:
        later = re.sub(r'(?m)^exclude-newer = ".*"$', f'exclude-newer = "{day}T00:00:00Z"', before)
        PYPROJECT.write_text(with_constraints(later, []), encoding="utf-8")
    LOCK.unlink(missing_ok=True)
    export = subprocess.run(EXPORT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if export.returncode != 0:
        PYPROJECT.write_text(before, encoding="utf-8")
        return export.returncode
    pins = pins_of(export.stdout)
    PYPROJECT.write_text(with_constraints(PYPROJECT.read_text(encoding="utf-8"), pins), encoding="utf-8")
    REQUIREMENTS.write_text(export.stdout, encoding="utf-8")
    print(f"{len(pins)} versions are pinned; uv sync --all-packages installs them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
