"""Facts about what is committed: pinned requirements, no hosts, no machine paths, nothing large, docs that agree with CI."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Written in pieces, so that this file does not hold what it looks for.
REGISTRY_HOSTS = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", r"registry\." + "npmjs", r"deb\." + "debian"])
)
MACHINE_PATHS = re.compile(r"(^|[^A-Za-z0-9_.])/(" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me"]) + ")/")


def settings(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def hook(folder: Path) -> dict[str, Any]:
    """The table of a project's metadata hook; empty if it has none."""
    return settings(folder)["tool"]["hatch"].get("metadata", {}).get("hooks", {}).get("custom", {})


def pins(text: str) -> list[Requirement]:
    return [Requirement(line.rstrip("\\ ")) for line in re.findall(r"(?m)^[A-Za-z0-9].*$", text)]


@pytest.fixture
def pinned(root: Path) -> dict[str, list[Requirement]]:
    """Name -> the pins of requirements.txt, several where versions differ by environment."""
    found: dict[str, list[Requirement]] = {}
    for pin in pins((root / "requirements.txt").read_text(encoding="utf-8")):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def test_the_constraints_are_the_pins_of_the_requirements(root: Path, pinned: dict[str, list[Requirement]]) -> None:
    """uv resolves to requirements.txt in every clone, whatever registries have added since."""
    constraints = {str(Requirement(text)) for text in settings(root)["tool"]["uv"]["constraint-dependencies"]}
    expected = {
        str(pin) if len(versions) > 1 else f"{pin.name}{pin.specifier}"
        for versions in pinned.values()
        for pin in versions
    }
    assert len(pinned) > 20 and constraints == expected, "run  python3 .ci/pin.py"


def test_every_dependency_of_every_member_is_pinned_within_its_bounds(
    root: Path, members: list[Path], pinned: dict[str, list[Requirement]]
) -> None:
    declared = list(settings(root)["dependency-groups"]["dev"])
    ours = {canonicalize_name(settings(folder)["project"]["name"]) for folder in members}
    for folder in members:
        declared += settings(folder)["project"].get("dependencies", []) + hook(folder).get("dependencies", [])
    assert len(declared) > 20
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        if name not in ours:
            assert name in pinned, f"{requirement} is missing: run  python3 .ci/pin.py"
            for pin in pinned[name]:
                version = next(iter(pin.specifier)).version
                assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is not met by {pin}"


def test_pin_writes_what_uv_resolves_and_forgets_old_versions_for_a_date(root: Path, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    pin = shutil.copy(root / ".ci" / "pin.py", tmp_path / ".ci")
    shutil.copy(root / "pyproject.toml", tmp_path)
    uv = tmp_path / "uv"  # one that keeps what it was asked, and finds what FOUND says
    uv.write_text('#!/bin/sh\ncp pyproject.toml asked.toml\ntest -n "$FOUND" && printf "$FOUND"\n', encoding="utf-8")
    uv.chmod(0o755)
    before = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")

    def run(found: str, *arguments: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FOUND": found}
        done = subprocess.run([sys.executable, pin, *arguments], env=environment, capture_output=True)
        asked = tomllib.loads((tmp_path / "asked.toml").read_text(encoding="utf-8"))["tool"]["uv"]
        return done.returncode, asked, settings(tmp_path)["tool"]["uv"]

    one = r"# note\na-b==1.0 ; python_version < '3.12' \\\n    --hash=sha256:00\na-b==2.0 ; python_version >= '3.12'\nc==3\n"
    status, asked, written = run(one)
    assert status == 0 and asked == settings(root)["tool"]["uv"]
    expected = ["a-b==1.0 ; python_version < '3.12'", "a-b==2.0 ; python_version >= '3.12'", "c==3"]
    assert written == {**asked, "constraint-dependencies": expected}
    assert (tmp_path / "requirements.txt").read_text(encoding="utf-8").startswith("# note\na-b==1.0")

    status, asked, written = run(r"c==4\n", "2027-01-31")
    assert status == 0 and asked["constraint-dependencies"] == []
    assert written["constraint-dependencies"] == ["c==4"] and written["exclude-newer"] == "2027-01-31T00:00:00Z"

    (tmp_path / "pyproject.toml").write_text(before, encoding="utf-8")
    status, asked, _ = run("", "2027-01-31")
    assert status != 0 and asked["constraint-dependencies"] == []
    assert (tmp_path / "pyproject.toml").read_text(encoding="utf-8") == before
    assert (tmp_path / "requirements.txt").read_text(encoding="utf-8") == "c==4\n"


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


@pytest.fixture
def projects(root: Path, members: list[Path]) -> list[Path]:
    """Folders of the projects with siblings: members of the workspace, and LAVIS's outside it."""
    lavis = root / "packages" / "fafa" / "lavis"
    assert lavis not in members
    return [folder for folder in [*members, lavis] if hook(folder)]


def test_projects_take_their_siblings_from_this_tree(projects: list[Path], members: list[Path]) -> None:
    """A plain `tbps-common` requirement could be met by a stranger's package of that name on a registry."""
    assert len(projects) > 5
    for folder in projects:
        siblings = hook(folder)["siblings"]
        found = [Requirement(text) for text in ProjectMetadata(str(folder), PluginManager()).core.dependencies]
        uris = {requirement.name: requirement.url for requirement in found if requirement.url}
        assert uris == {name: (folder / path).resolve().as_uri() for name, path in siblings.items()}
        if folder in members:
            sources = settings(folder)["tool"]["uv"]["sources"]
            tested_with = set(settings(folder).get("dependency-groups", {}).get("dev", []))
            assert sources == {name: {"workspace": True} for name in {*siblings, *tested_with}}


def test_a_project_outside_the_tree_refuses_to_build(root: Path, projects: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(projects):
        tree = tmp_path / str(number)
        lonely = tree / folder.relative_to(root)
        lonely.mkdir(parents=True)
        shutil.copy(folder / "pyproject.toml", lonely)
        with pytest.raises(OSError, match=re.escape(hook(folder)["path"])):
            _ = ProjectMetadata(str(lonely), PluginManager()).core.dependencies
        shutil.copy(root / "hatch_build.py", tree)
        with pytest.raises(FileNotFoundError, match="checkout of the whole repository"):
            _ = ProjectMetadata(str(lonely), PluginManager()).core.dependencies


def test_ci_runs_the_test_command_of_the_readme(root: Path) -> None:
    command = "pip install uv && uv run --all-packages pytest -n auto --dist loadfile"
    assert command in (root / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
