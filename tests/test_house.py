"""The house as facts: who may import whom, no circles, one training loop per paper, one build hook."""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = "tbps_common"
WORLD = "tbps_world"
SOURCES = {path.name: path / "src" / path.name for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()}
PAPERS = [name for name in SOURCES if name != SHARED]
# The model side can be used without its training dependencies, so nothing reachable from it may be on the training side.
MODEL_SIDE = {"model", "objectives", "losses"}
TRAINING_SIDE = {"train", "training", "solver", "datasets", "data", "checkpoint", "options", "config", "cli"}
TRAINING_SIDE |= {"evaluate", "search", "convert", "toy", "bench"}
# Rooms of a paper's own, which train small things beside the paper's network (a LoRA, an encoder).
OWN_ROOMS = {"fafa": {"syncpr"}, "mra": {"dad"}}


# The import graph.


def module_name(path: Path, source: Path) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, inside functions too, but for the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            yield from (below for branch in child.orelse for below in (branch, *executed(branch)))  # type: ignore[attr-defined]
        else:
            yield child
            yield from executed(child)


def imports_of(nodes: Iterator[ast.AST], module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """`(module, name)` of every import as absolute names; the name is empty for `import module`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), ""


def exported(tree: ast.Module, module: str) -> dict[str, str]:
    """Name -> module that an `__init__` takes it from, also if it does so on first use (`lazy_loader`, `__getattr__`)."""
    names = {name: base for base, name in imports_of(ast.walk(tree), module, True) if name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("lazy_loader.attach", "lazy.attach", "attach"):
            for table in (part.value for part in node.keywords if part.arg == "submod_attrs"):
                for below, attributes in ast.literal_eval(table).items():
                    names |= dict.fromkeys(attributes, f"{module}.{below}")
    return names


@functools.cache
def import_graph(source: Path) -> dict[str, set[str]]:
    """Module -> the modules that it imports, at any depth; names that a package re-exports count for where they come from.

    Importing a module runs the `__init__` of every package around it, so these count too, unless the importer lies in them.
    """
    files = {module_name(path, source): path for path in sorted(source.rglob("*.py"))}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items()}
    inits = {module for module, path in files.items() if path.name == "__init__.py"}
    homes = {module: exported(trees[module], module) for module in inits}

    def targets(base: str, name: str) -> Iterator[str]:
        yield base
        if f"{base}.{name}" in files:
            yield f"{base}.{name}"
        elif name in homes.get(base, {}) and homes[base][name] != base:
            yield from targets(homes[base][name], name)

    graph: dict[str, set[str]] = {}
    for module in files:
        graph[module] = set()
        for base, name in imports_of(executed(trees[module]), module, module in inits):
            for target in targets(base, name):
                parts = target.split(".")
                around = {".".join(parts[:end]) for end in range(1, len(parts))}
                graph[module] |= {target} | {
                    package for package in around if not f"{module}.".startswith(f"{package}.")
                }
        graph[module].discard(module)
        # `from package import name`: the package is around the importer, which found it imported already.
        graph[module] -= {package for package in inits if module.startswith(f"{package}.")}
    return graph


def reached_from(start: set[str], graph: dict[str, set[str]]) -> dict[str, str]:
    """Every module that is reached from `start` by one import or more -> a module that imports it."""
    found: dict[str, str] = {}
    frontier = list(start)
    while frontier:
        module = frontier.pop()
        for imported in graph[module] & set(graph) - set(found):
            found[imported] = module
            frontier.append(imported)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reached = {module: set(reached_from({module}, graph)) for module in graph}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(group) for group in groups if group)


# Directions.


def test_every_member_is_a_typed_package() -> None:
    assert SHARED in SOURCES and len(PAPERS) >= 1
    for name, source in SOURCES.items():
        assert (source / "__init__.py").is_file() and (source / "py.typed").is_file(), f"{name} is not a typed package"


@pytest.mark.parametrize("package", SOURCES)
def test_papers_import_the_shared_room_and_never_each_other(package: str) -> None:
    folder = ROOT / "packages" / package
    files = [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in ("tests", ".venv")]
    assert files
    for path in files:
        allowed = {package} | ({SHARED} if package != SHARED else set())
        if path.relative_to(folder).parts[0] == "benchmarks":  # not part of the wheel
            allowed.add(WORLD)
        imports = imports_of(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), "", False)
        crossing = sorted({base for base, _ in imports if base.split(".")[0] in {*SOURCES, WORLD} - allowed})
        assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


@pytest.mark.parametrize("package", SOURCES)
def test_the_world_toys_and_practice_servers_are_no_part_of_a_package(package: str) -> None:
    graph = import_graph(SOURCES[package])
    found = [module for module in graph if re.search(r"\.(toy\w*|practice\w*|synth)\b", module)]
    assert not found, f"tests/world is the place of {found}"


@pytest.mark.parametrize("package", PAPERS)
def test_the_model_side_never_reaches_the_training_side(package: str) -> None:
    graph = import_graph(SOURCES[package])
    side = {module for module in graph if MODEL_SIDE & set(module.split(".")[1:2])}
    assert side, f"{package} has no model side"
    for module, importer in reached_from(side, graph).items():
        assert not TRAINING_SIDE & set(module.split(".")[1:2]), (
            f"{importer} imports {module}: model code on training code"
        )


@pytest.mark.parametrize("package", SOURCES)
def test_no_modules_import_each_other(package: str) -> None:
    found = circles(import_graph(SOURCES[package]))
    assert not found, "\n".join(" <-> ".join(group) for group in found)


# Files.


def passes_on(tree: ast.Module) -> bool:
    """Whether a module holds imports and nothing else."""
    content = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]
    return bool(content) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in content)


@pytest.mark.parametrize("package", SOURCES)
def test_no_file_only_passes_things_on(package: str) -> None:
    files = [path for path in SOURCES[package].rglob("*.py") if path.name != "__init__.py"]
    found = [path for path in files if passes_on(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, f"these only import: {[str(path.relative_to(SOURCES[package])) for path in found]}"


def is_training_call(node: ast.AST) -> bool:
    """`loss.backward()`, `accelerator.backward(loss)`, `precision.backward_and_step(...)`, or transformers' `trainer.train`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    if node.func.attr == "train":  # The flag tells it from `model.train()`.
        return "resume_from_checkpoint" in {keyword.arg for keyword in node.keywords}
    return node.func.attr.startswith("backward")


def has_training_loop(tree: ast.Module) -> bool:
    """Whether gradients are computed in a loop: by the loop itself, or by functions of the file that it calls.

    The loop of transformers' trainer is in `trainer.train`.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for loop in ast.walk(tree) if isinstance(loop, ast.For | ast.While) for node in ast.walk(loop)]
    reached: list[ast.AST] = inside
    seen: set[str] = set()
    while reached and not any(map(is_training_call, reached)):
        called = {ast.unparse(node.func).split(".")[-1] for node in reached if isinstance(node, ast.Call)} - seen
        seen |= called
        reached = [node for function in functions if function.name in called for node in ast.walk(function)]
    by_trainer = any(
        isinstance(node, ast.Call) and is_training_call(node) and ast.unparse(node.func).endswith(".train")
        for node in ast.walk(tree)
    )
    return by_trainer or bool(reached)


@pytest.mark.parametrize("package", PAPERS)
def test_a_papers_training_loop_is_in_its_train_py_and_nowhere_else(package: str) -> None:
    source = SOURCES[package]
    files = [
        path for path in source.rglob("*.py") if path.relative_to(source).parts[0] not in OWN_ROOMS.get(package, ())
    ]
    trees = {str(path.relative_to(source)): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    computing = sorted(name for name, tree in trees.items() if any(map(is_training_call, ast.walk(tree))))
    assert computing == ["train.py"], f"gradients of {package} are computed in {computing}"
    assert has_training_loop(trees["train.py"]), f"{package}'s train.py has no loop over steps"


def test_there_is_one_build_hook_and_every_package_with_siblings_points_to_it() -> None:
    projects = [path for path in (ROOT / "packages").rglob("pyproject.toml") if ".venv" not in path.parts]
    projects += (ROOT / "tests").rglob("pyproject.toml")
    assert [path for folder in ("packages", "tests") for path in (ROOT / folder).rglob("hatch_build.py")] == []
    pointing = 0
    for path in projects:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        if "dependencies" in settings["project"].get("dynamic", []):
            hook = settings["tool"]["hatch"]["metadata"]["hooks"]["custom"]
            assert (path.parent / hook["path"]).resolve() == ROOT / "hatch_build.py", path
            pointing += 1
    assert pointing > len(PAPERS)


# The checker itself.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package `p` with two circles: through a function and a lazy name, and through the `__init__` of a package."""
    source = tmp_path / "p"
    for name, text in {
        "__init__.py": "import lazy_loader\nx = lazy_loader.attach(__name__, submod_attrs={'a': ['A']})\n",
        "a.py": "from .b import B\n",
        "b.py": "def f():\n    from p import A\n",
        "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.d import D\nelse:\n    import json\n",
        "d.py": "from p import c\nimport importlib\nimportlib.import_module('p.sub.e')\n",
        "sub/__init__.py": "from p.d import D\n",
        "sub/e.py": "from . import f\nfrom .. import c\n",
        "sub/f.py": "import os.path\n",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    return source


def test_the_graph_resolves_names_and_leaves_out_what_only_type_checkers_read(tree: Path) -> None:
    graph = import_graph(tree)
    assert graph["p"] == {"lazy_loader"} and graph["p.a"] == {"p.b"} and graph["p.b"] == {"p.a"}
    assert graph["p.c"] == {"typing", "json"}
    assert graph["p.d"] == {"p.c", "importlib", "p.sub", "p.sub.e"}
    assert graph["p.sub.e"] == {"p.sub.f", "p.c"} and graph["p.sub.f"] == {"os", "os.path"}


def test_circles_are_found(tree: Path) -> None:
    assert circles(import_graph(tree)) == [["p.a", "p.b"], ["p.d", "p.sub"]]


@pytest.mark.parametrize(
    "text, loop",
    [
        ("for batch in batches:\n    loss(batch).backward()", True),
        ("def step(x):\n    accelerator.backward(x)\nwhile True:\n    step(1)", True),
        ("trainer.train(resume_from_checkpoint=None)", True),
        ("for epoch in range(3):\n    model.train()", False),
        ("loss.backward()", False),
    ],
)
def test_training_loops_are_told_from_single_steps(text: str, loop: bool) -> None:
    assert has_training_loop(ast.parse(text)) == loop


@pytest.mark.parametrize(
    "text, nothing_else",
    [('"""Doc."""\nfrom a import b\n__all__ = ["b"]', True), ("from a import b\nC = b", False), ('"""Doc."""', False)],
)
def test_files_that_only_pass_on_are_told(text: str, nothing_else: bool) -> None:
    assert passes_on(ast.parse(text)) == nothing_else
