"""A hand-made CUHK-PEDES tree of coloured figures, a tiny CLIP, and the paper's command with flags for their size."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PACKAGE = Path(__file__).resolve().parents[2]
COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 50, 200),
    "white": (235, 235, 235),
    "black": (25, 25, 25),
    "yellow": (230, 210, 40),
}
README_FLAGS = [
    *("--name", "cmlfa"),
    "--img_aug",
    *("--batch_size", "64"),
    "--MLM",
    *("--loss_names", "sdm+mlm+id+itc"),
    *("--dataset_name", "CUHK-PEDES"),
    *("--num_epoch", "150"),
    *("--id_loss_weight", "0.5"),
    *("--mlm_loss_weight", "0.5"),
]


def write_world(root: Path, splits: dict[str, int], images_per_id: int = 2) -> None:
    """Write a tree of `splits` ids whose captions name the two colours that their pictures show."""
    names = list(COLOURS)
    records = []
    pid = 0
    for split, count in splits.items():
        for _ in range(count):
            pid += 1
            upper, lower = names[pid % 6], names[(pid // 6 + 2 * pid + 1) % 6]
            for view in range(images_per_id):
                pixels = np.random.default_rng(100 * pid + view).integers(0, 40, (96, 48, 3))
                pixels[16:52, 10:38] += np.array(COLOURS[upper]) * 4 // 5
                pixels[52:90, 14:34] += np.array(COLOURS[lower]) * 4 // 5
                name = f"cam_a/{pid:04d}_{view}.png"
                path = root / "CUHK-PEDES" / "imgs" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
                captions = [
                    f"A person in a {upper} shirt and {lower} trousers.",
                    f"Wearing {lower} trousers, the pedestrian has a {upper} top, seen {'again' * view}.",
                ]
                records.append({"split": split, "captions": captions, "file_path": name, "id": pid})
    (root / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 6 training, 3 validation and 4 test ids, two images each."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, {"train": 6, "val": 3, "test": 4})
    return root


@pytest.fixture(scope="session")
def other_world(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the same pictures as ICFG-PEDES, with one training id less."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(world / "CUHK-PEDES" / "imgs", root / "ICFG-PEDES" / "imgs")
    records = json.loads((world / "CUHK-PEDES" / "reid_raw.json").read_text(encoding="utf-8"))
    kept = [record for record in records if record["id"] != 1]
    (root / "ICFG-PEDES" / "ICFG_PEDES.json").write_text(json.dumps(kept), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP start file of random weights, with a small vocabulary table."""
    from tbps_world.cli import cmlfa_tiny_main

    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    assert cmlfa_tiny_main(["--out", str(path), "--layers", "1"]) == 0
    return path


@pytest.fixture(scope="session")
def size_flags(tiny_clip: Path, world: Path) -> list[str]:
    """Flags appended to the README's command: data, start file, and everything small."""
    return [
        *("--root_dir", str(world), "--pretrain_choice", str(tiny_clip)),
        *("--img_size", "64,32", "--text_length", "20", "--cmt_depth", "1", "--lfa_layers", "1", "--lfa_heads", "2"),
        *("--batch_size", "8", "--num_epoch", "2", "--num_workers", "0", "--log_period", "1", "--device", "cpu"),
    ]


@pytest.fixture(scope="session")
def train_flags(size_flags: list[str]) -> Callable[..., list[str]]:
    """`train_flags(output_dir, *more)`: the README's flags, the size flags, the output folder, and `more`."""

    def flags(output_dir: Path, *more: str) -> list[str]:
        return [*README_FLAGS, *size_flags, "--output_dir", str(output_dir), *more]

    return flags


@pytest.fixture(scope="session")
def only_run() -> Callable[[Path], Path]:
    """`only_run(output_dir)`: the one run directory under it."""

    def find(output_dir: Path) -> Path:
        (directory,) = [path for path in output_dir.glob("*/*") if path.is_dir()]
        return directory

    return find


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> Path:
    """The run directory of the README's command, trained for two epochs. Tests must not write into it."""
    from cmlfa.cli import train_main

    output_dir = tmp_path_factory.mktemp("logs")
    assert train_main(train_flags(output_dir)) == 0
    return only_run(output_dir)


@pytest.fixture(scope="session")
def start_script() -> Callable[..., subprocess.Popen[str]]:
    """`start_script("train.py", flags, cwd=...)`: start a script of the package as a user does."""

    def start(script: str, flags: list[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(PACKAGE / script), *flags],
            cwd=cwd or PACKAGE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
