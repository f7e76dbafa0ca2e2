"""Tiny models of random weights, a chat server that answers by a rule, and a folder with the first stages done."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fafa.cli import syncpr_main
from tbps_world.cli import syncpr_tiny_main
from tbps_world.practice.server import PracticeServer
from tbps_world.practice.syncpr import answer
from tbps_world.tiny.fafa import write_toy_data


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PracticeServer]:
    """The practice server, named by the environment."""
    with PracticeServer(answer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "canary-key-of-the-tests")
        yield server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fafa-syncpr-make-tiny`: sd/, flux/, clip/. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("models")
    assert syncpr_tiny_main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fafa-syncpr pairs` of FAFA's toy triplets: 16 pictures of 32 x 32. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("pairs")
    write_toy_data(folder / "toy")
    small = ["--height", "32", "--width", "32"]
    assert syncpr_main(["pairs", "--out", str(folder), "--syncpr", str(folder / "toy" / "syncpr"), *small]) == 0
    return folder


@pytest.fixture(scope="session")
def pictured(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Six quadruples with two pictures each, made by two shards. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("pictured")
    with PracticeServer(answer) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "any")
        flags = ["--base-url", server.url, "--count", "6", "--per-request", "2"]
        assert syncpr_main(["quadruples", "--out", str(folder), *flags]) == 0
    for shard in ("1/2", "2/2"):
        assert syncpr_main(["images", "--out", str(folder), *image_flags_of(models), "--shard", shard]) == 0
    return folder


def image_flags_of(models: Path) -> list[str]:
    return [
        *("--model", str(models / "sd"), "--variants", "2", "--height", "32", "--width", "32", "--steps", "2"),
        *("--half-height", "32", "--half-width", "16", "--folder-size", "4", "--batch-size", "3", "--device", "cpu"),
    ]


@pytest.fixture(scope="session")
def image_flags(models: Path) -> list[str]:
    """Flags of `fafa-syncpr images` for pictures of 32 x 32 within moments."""
    return image_flags_of(models)


@pytest.fixture
def copy_of_pictured(pictured: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(pictured, tmp_path / "pictured"))


@pytest.fixture(scope="session")
def filter_flags(models: Path) -> Callable[..., list[str]]:
    """`filter_flags(*more)`: flags of `fafa-syncpr filter` that let random weights pass, and `more`."""

    def flags(*more: str) -> list[str]:
        lenient = ["--min-image-text", "-1", "--min-identity", "-1", "--max-pair-similarity", "2"]
        return ["--clip", str(models / "clip"), *lenient, "--device", "cpu", "--workers", "2", *more]

    return flags
