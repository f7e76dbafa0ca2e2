"""Facts about what is committed: pinned requirements, no hosts, no machine paths, nothing large, docs that agree with CI."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

EXPORT = ["export", "--quiet", "--all-packages", "--no-emit-workspace", "--no-header"]
# Written in pieces, so that this file does not hold what it looks for.
REGISTRY_HOSTS = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", r"registry\." + "npmjs", r"deb\." + "debian"])
)
MACHINE_PATHS = re.compile(r"(^|[^A-Za-z0-9_.])/(" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me"]) + ")/")


def requirement_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_requirements_are_the_export_of_the_current_resolution(root: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    export = subprocess.run([uv, *EXPORT], cwd=root, capture_output=True, text=True)
    assert export.returncode == 0, export.stderr
    committed = (root / "requirements.txt").read_text(encoding="utf-8")
    assert requirement_lines(committed) == requirement_lines(export.stdout), (
        "requirements.txt is stale: run  uv export --quiet --all-packages --no-emit-workspace -o requirements.txt"
    )


def test_requirements_are_hash_pinned_and_name_no_host(root: Path) -> None:
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)
    pinned = [block for block in blocks if re.match(r"[A-Za-z0-9._-]+(\[.*\])?==", block)]
    assert len(pinned) > 20 and all("--hash=sha256:" in block for block in pinned)
    assert "://" not in text and "file:" not in text


def test_no_tracked_file_names_a_registry_or_a_machine_path(root: Path, tracked_files: list[Path]) -> None:
    for path in tracked_files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (REGISTRY_HOSTS, MACHINE_PATHS):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(root)} holds {found.group(0) if found else ''}"


def test_nothing_large_and_no_lock_file_is_tracked(root: Path, tracked_files: list[Path]) -> None:
    assert [path for path in tracked_files if path.stat().st_size > 1_000_000] == []
    assert root / "uv.lock" not in tracked_files


def test_members_take_the_shared_package_from_this_tree(root: Path, packages: dict[str, Path]) -> None:
    """A plain `tbps-common` requirement could be met by a stranger's package of that name on a registry."""
    shared = (root / "packages" / "tbps_common").as_uri()
    for name in set(packages) - {"tbps_common"}:
        requirements = importlib.metadata.requires(name) or []
        found = [requirement for requirement in requirements if requirement.startswith("tbps-common")]
        assert [requirement.replace(" ", "") for requirement in found] == [f"tbps-common@{shared}"], name
        settings = tomllib.loads((root / "packages" / name / "pyproject.toml").read_text(encoding="utf-8"))
        assert settings["tool"]["uv"]["sources"]["tbps-common"] == {"workspace": True}


def test_a_package_outside_the_tree_refuses_to_build(root: Path, packages: dict[str, Path], tmp_path: Path) -> None:
    for name in set(packages) - {"tbps_common"}:
        spec = importlib.util.spec_from_file_location("hook", root / "packages" / name / "hatch_build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = {"siblings": {"tbps-common": "../tbps_common"}, "dependencies": ["tbps-common", "numpy>=2"]}
        with pytest.raises(FileNotFoundError, match="checkout of the whole repository"):
            module.SiblingDependencies(str(tmp_path / "lonely"), settings).update({})


def test_ci_runs_the_test_command_of_the_readme(root: Path) -> None:
    command = "pip install uv && uv run --all-packages pytest -n auto --dist loadfile"
    assert command in (root / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
