"""A small synthetic world, tiny backbones, and the released flags with sizes for a laptop."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
LAYOUT = PACKAGE / "DiaNA"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, data root or key of the machine takes part."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LAUNCHER",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "DIANA_DATA_ROOT",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatPedes and MALS of 12 training and 4 test persons, two pictures each, 64x32 pixels."""
    from tbps_world.cli import synth_main

    root = tmp_path_factory.mktemp("diana") / "world"
    flags = ["--out", str(root), "--preset", "tiny", "--ids", "20", "--views", "2", "--height", "64", "--workers", "1"]
    assert synth_main([*flags, "--layouts", "chatpedes,mals"]) == 0
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diana-make-tiny writes."""
    from tbps_world.cli import diana_tiny_main

    out = tmp_path_factory.mktemp("diana") / "tiny"
    assert diana_tiny_main(["--out", str(out), "--image_size", "64", "32"]) == 0
    return out


@pytest.fixture(scope="session")
def sizes() -> list[str]:
    """Flags appended to those of the scripts, so that a step takes a tenth of a second."""
    return [
        *("--force_image_size", "64", "32", "--num_query", "3", "--dataloader_num_workers", "0"),
        *(
            "--bf16",
            "False",
            "--grad_checkpointing",
            "off",
            "--logging_steps",
            "1",
            "--per_device_train_batch_size",
            "8",
        ),
    ]


@pytest.fixture(scope="session")
def script_environment(world: Path, tiny: Path) -> dict[str, str]:
    """Environment in which the unedited scripts find the world and the backbones."""
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "DIANA_DATA_ROOT": str(world),
        "VISION_PRETRAINED": str(tiny / "swinv2-tiny"),
        "LLAMA_PRETRAINED": str(tiny / "llama-tiny"),
        "CONFIG_DIR": str(tiny / "configs"),
    }


def flags_of(script: str, environment: dict[str, str], *more: str) -> list[str]:
    """The words that a shell script hands to its Python program."""
    folder = LAYOUT / ("eval" if script == "eval.sh" else "train")
    printer = "import sys; print('\\0'.join(sys.argv[1:]))"
    # `bash -c` replaces the interpreter by one that only prints its arguments.
    stand_in = PACKAGE / "tests" / "print_arguments.sh"
    done = subprocess.run(
        ["bash", f"shell/{script}", *more],
        cwd=folder,
        env={**environment, "PYTHON": str(stand_in), "REAL_PYTHON": sys.executable, "PRINTER": printer},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").split("\0")


@pytest.fixture(scope="session")
def script_words() -> Callable[..., list[str]]:
    """`script_words(script, environment, *more)`: all words the script's program receives."""
    return flags_of


@pytest.fixture(scope="session")
def train_flags(script_environment: dict[str, str], sizes: list[str]) -> Callable[..., list[str]]:
    """`train_flags("pretrain", output_dir, *more)`: flags of a script with the sizes and `more` appended."""

    @functools.cache
    def script_flags(stage: str) -> list[str]:
        words = flags_of(f"{stage}.sh", {**script_environment, "OUTPUT_DIR": "OUTPUT_DIR"})
        return words[words.index("main/train/train.py") + 1 :]

    def flags(stage: str, output_dir: Path, *more: str) -> list[str]:
        # The scripts run in train/; tests call the program from anywhere.
        files = ("configs/dataset_config.yaml", "zero_stage3_config.json")
        replaced = {"OUTPUT_DIR": str(output_dir)} | {name: str(LAYOUT / "train" / name) for name in files}
        words = [replaced.get(word, word) for word in script_flags(stage)]
        if "--dataset_config_path" not in words:
            words += ["--dataset_config_path", replaced["configs/dataset_config.yaml"]]
        return [*words, *sizes, *more]

    return flags


@pytest.fixture(scope="session")
def pretrained(world: Path, tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]]) -> Path:
    """The folder of a pre-training of one epoch. Tests must not write into it."""
    from diana.cli import train_main

    out = tmp_path_factory.mktemp("diana") / "pretrain"
    before = os.environ.get("DIANA_DATA_ROOT")
    os.environ["DIANA_DATA_ROOT"] = str(world)
    try:
        assert train_main(train_flags("pretrain", out, "--num_train_epochs", "1")) == 0
    finally:
        os.environ.pop("DIANA_DATA_ROOT") if before is None else os.environ.update(DIANA_DATA_ROOT=before)
    return out


@pytest.fixture
def data_root(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world, named by DIANA_DATA_ROOT."""
    monkeypatch.setenv("DIANA_DATA_ROOT", str(world))
    return world
