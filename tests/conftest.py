"""Paths and facts about the whole repository for the workspace tests."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def members(root: Path) -> list[Path]:
    """Folders of the workspace's members."""
    patterns = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["workspace"][
        "members"
    ]
    return sorted(folder for pattern in patterns for folder in root.glob(pattern) if folder.is_dir())


@pytest.fixture(scope="session")
def tracked_files(root: Path) -> list[Path]:
    """Files git tracks; outside a checkout (a source archive) the tests that need them skip."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
