"""Who may import whom: papers never import each other, and a model never imports its own training code."""

import ast
from pathlib import Path

import pytest

SHARED = "tbps_common"
# The model side can be used without its training dependencies, so nothing reachable from it may be on the training side.
MODEL_SIDE = ("model", "objectives", "losses")
TRAINING_SIDE = ("training", "solver", "datasets", "data", "checkpoint", "options", "config", "cli", "toy", "bench")


def module_name(path: Path, source: Path) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, module: str) -> set[str]:
    """Every dotted name that the file imports, at any depth (lazy imports count), as absolute names."""
    names: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base]).rstrip(".")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def import_graph(source: Path) -> dict[str, set[str]]:
    files = {module_name(path, source): path for path in source.rglob("*.py")}
    return {module: imported_names(path, module) for module, path in files.items()}


def test_every_member_is_a_package(packages: dict[str, Path]) -> None:
    assert SHARED in packages and len(packages) >= 2
    for name, source in packages.items():
        assert (source / "__init__.py").is_file() and (source / "py.typed").is_file(), f"{name} is not a typed package"


def test_papers_never_import_each_other_and_the_shared_room_imports_no_paper(packages: dict[str, Path]) -> None:
    for name, source in packages.items():
        forbidden = set(packages) - {name, SHARED} if name != SHARED else set(packages) - {SHARED}
        for module, imports in import_graph(source).items():
            crossing = {imported for imported in imports if imported.split(".")[0] in forbidden}
            assert not crossing, f"{module} imports {sorted(crossing)}"


def test_the_model_side_never_reaches_the_training_side(packages: dict[str, Path]) -> None:
    for name, source in packages.items():
        if name == SHARED:
            continue
        graph = import_graph(source)
        side = {module for module in graph if module.split(".")[1:2] and module.split(".")[1] in MODEL_SIDE}
        assert side, f"{name} has no model side"
        reached, frontier = set(side), list(side)
        while frontier:
            module = frontier.pop()
            for imported in graph[module] & set(graph):
                top = imported.split(".")[1:2]
                assert not (top and top[0] in TRAINING_SIDE), (
                    f"{module} imports {imported}: model code on training code"
                )
                if imported not in reached and imported != name:
                    reached.add(imported)
                    frontier.append(imported)


@pytest.mark.parametrize(
    "text, found", [("from .b import c", "pkg.sub.b.c"), ("from .. import d", "pkg.d"), ("import x.y", "x.y")]
)
def test_the_reader_of_imports_resolves_relative_names(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "a.py"
    file.write_text(text, encoding="utf-8")
    assert found in imported_names(file, "pkg.sub.a")
