"""Constructs that run data as code, or read it unsafely, stay out of the tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# The one file that may call torch.load with weights_only=False, behind an explicit flag of the user.
CHECKPOINT_READER = ("run", "checkpoint.py")


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_calls(source: str) -> Iterator[str]:
    """Describe each unsafe call in a file's source text."""
    tree = ast.parse(source)
    # A loader defined in the same file is as safe as the one it extends.
    safe_loaders = {"SafeLoader", "CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(dotted(base).split(".")[-1] in safe_loaders for base in node.bases):
            safe_loaders.add(node.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield f"line {node.lineno}: {name}"
        if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            loader = dotted(keywords["Loader"]) if "Loader" in keywords else ""
            if loader.split(".")[-1] not in safe_loaders:
                yield f"line {node.lineno}: {name} with loader {loader or 'unknown'}"
        shell = keywords.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            yield f"line {node.lineno}: shell={ast.unparse(shell)}"
        if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"


def test_no_unsafe_call_in_the_tree(root: Path) -> None:
    files = [path for folder in ("packages", "tests") for path in (root / folder).rglob("*.py")]
    assert len(files) > 20
    found = []
    for path in files:
        reader = path.parts[-2:] == CHECKPOINT_READER
        for call in unsafe_calls(path.read_text(encoding="utf-8")):
            if not (reader and "torch.load" in call):
                found.append(f"{path.relative_to(root)} {call}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "os.system('ls')",
        "subprocess.run(x, shell=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, Loader=yaml.Loader)",
        "pickle.load(f)",
    ],
)
def test_the_detector_sees(line: str) -> None:
    assert list(unsafe_calls(line))


@pytest.mark.parametrize(
    "line",
    ["torch.load(f, weights_only=True)", "model.eval()", "class L(yaml.SafeLoader): ...\nyaml.load(f, Loader=L)"],
)
def test_the_detector_lets_pass(line: str) -> None:
    assert not list(unsafe_calls(line))
