"""Settings of the whole test tree: no network, one thread, reference numbers through TBPS_GOLDEN.

`TBPS_GOLDEN` names the folder `golden/<package>/<case>/`. Without it the parity tests skip and say so; with it a skipped
parity test fails the run, so that a renamed folder cannot pass unseen.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

GOLDEN_VARIABLE = "TBPS_GOLDEN"


@dataclass(frozen=True)
class GoldenCase:
    """One folder of reference numbers: `case.json`, and safetensors files where the case has them."""

    folder: Path

    @cached_property
    def case(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    def tensors(self, name: str = "tensors.safetensors") -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.folder / name)


def golden_root() -> Path | None:
    value = os.environ.get(GOLDEN_VARIABLE)
    return Path(value) if value else None


def golden_names(package: str) -> list[str]:
    """Names of the stored cases of a package, for parametrisation (one placeholder without TBPS_GOLDEN)."""
    root = golden_root()
    if root is None or not (root / package).is_dir():
        return ["golden-folder-absent"]
    return sorted(case.parent.name for case in (root / package).glob("*/case.json"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `golden(package, kind=...)` with an argument `golden_name` runs once per stored case of that kind."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None or "golden_name" not in metafunc.fixturenames:
        return
    package, kind = marker.args[0], marker.kwargs.get("kind")
    root = golden_root()
    names = golden_names(package)
    if root is not None and kind is not None:
        kinds = (kind,) if isinstance(kind, str) else tuple(kind)
        names = [name for name in names if (root / package / name / "case.json").is_file()]
        names = [name for name in names if GoldenCase(root / package / name).case["kind"] in kinds]
    metafunc.parametrize("golden_name", names or ["golden-folder-absent"])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], GoldenCase]:
    """`golden(name)`: the case of that name of the package given in the test's `golden(package)` marker."""
    marker = request.node.get_closest_marker("golden")
    assert marker is not None and marker.args, "mark the test with @pytest.mark.golden('<package>')"

    def find(name: str) -> GoldenCase:
        root = golden_root()
        if root is None:
            pytest.skip(f"{GOLDEN_VARIABLE} is not set: reference numbers are not part of the repository")
        folder = root / marker.args[0] / name
        if not (folder / "case.json").is_file():
            pytest.fail(f"{GOLDEN_VARIABLE} is set, but {folder} holds no case.json")
        return GoldenCase(folder)

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with `-n`, one of them begun last would keep the other processes waiting."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    outcome = yield
    report = outcome.get_result()
    if golden_root() is not None and report.skipped and item.get_closest_marker("golden") is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: a parity test was skipped although {GOLDEN_VARIABLE} is set"
    if item.get_closest_marker("golden") is not None:
        report.user_properties.append(_PARITY)


_PARITY = ("parity", True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # Reports reach the terminal from every process of `-n`, their items do not.
    passed = [
        report for report in terminalreporter.getreports("passed") if _PARITY in map(tuple, report.user_properties)
    ]
    terminalreporter.write_line(f"parity tests passed: {len(passed)}")


@pytest.fixture
def kill_when_changed() -> Callable[..., None]:
    """`kill_when_changed(command, flags, watches, preload)`: start `command(flags)` in a process of its own once per
    watch, and SIGKILL it in the moment in which what `watch()` returns has changed. `preload` names the modules that the
    processes find imported, so that they start at once.
    """

    def kill(
        command: Callable[[list[str]], int],
        flags: list[str],
        watches: Sequence[Callable[[], object]],
        preload: Sequence[str] = (),
    ) -> None:
        import multiprocessing

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        for number, watch in enumerate(watches):
            before = watch()
            child = context.Process(target=command, args=(flags,))
            child.start()
            while child.is_alive() and watch() == before:
                time.sleep(0.001)
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL, f"run {number} ended by itself with {child.exitcode}"

    return kill


@pytest.fixture
def second_process_raises(tmp_path: Path) -> dict[str, str]:
    """Variables of the environment under which process 1 of a torchrun raises "rank one is lost" in its second step."""
    folder = tmp_path / "sitecustomize"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from tbps_common.run.stop import FiniteLoss\n"
        "    update, calls = FiniteLoss.update, []\n"
        "    def fail(self, loss, iteration):\n"
        "        calls.append(iteration)\n"
        "        if len(calls) == 2: raise RuntimeError('rank one is lost')\n"
        "        update(self, loss, iteration)\n"
        "    FiniteLoss.update = fail\n",
        encoding="utf-8",
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    # The first backward pass decides whether autograd starts threads for devices, after which no forked process can compute
    # gradients. Fake tensors (the dry run, ONNX export) make it believe that there is a GPU, so it must come before them.
    torch.ones(1, requires_grad=True).sum().backward()
