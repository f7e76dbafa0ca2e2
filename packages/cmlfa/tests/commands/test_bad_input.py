"""What a user sees of a mistake or a fault: one sentence, the right exit status, and nothing half-written."""

import argparse
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmlfa.cli import test_main as run_test
from cmlfa.cli import train_main
from tbps_world.cli import cmlfa_tiny_main

ANNOTATIONS = Path("CUHK-PEDES") / "reid_raw.json"


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is told; no traceback."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may damage."""
    root = tmp_path / "world"
    shutil.copytree(world, root)
    return root


def damage_annotations(root: Path, change: Callable[[list[dict]], None]) -> None:
    path = root / ANNOTATIONS
    records = json.loads(path.read_text(encoding="utf-8"))
    change(records)
    path.write_text(json.dumps(records), encoding="utf-8")


def drop_split(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        def change(records: list[dict]) -> None:
            records[:] = [record for record in records if record["split"] != name]

        damage_annotations(root, change)

    return apply


def lose_captions_of_images(root: Path) -> None:
    """The last person's images all vanish from the test split, the captions stay with another image's record."""

    def change(records: list[dict]) -> None:
        for record in records:
            record["captions"] = []

    damage_annotations(root, change)


def escape(root: Path) -> None:
    damage_annotations(root, lambda records: records[0].update(file_path="../../secret.png"))


def rename_annotations(root: Path) -> None:
    (root / ANNOTATIONS).rename(root / "CUHK-PEDES" / "caption_all.json")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: shutil.rmtree(root), "CUHK-PEDES"),
        (lambda root: shutil.rmtree(root / "CUHK-PEDES" / "imgs"), "imgs"),
        (lambda root: (root / ANNOTATIONS).unlink(), "reid_raw.json"),
        (rename_annotations, "reid_raw.json"),
        (lambda root: (root / ANNOTATIONS).write_text("[{]", encoding="utf-8"), "reid_raw.json"),
        (lambda root: next((root / "CUHK-PEDES" / "imgs" / "cam_a").glob("0001_*")).unlink(), "0001_"),
        (drop_split("train"), "training split"),
        (drop_split("test"), "test split"),
        (lose_captions_of_images, "training split"),
        (escape, "../../secret.png"),
    ],
    ids=[
        "no root",
        "no images folder",
        "no annotations",
        "wrong annotations",
        "broken JSON",
        "missing image",
        "no training split",
        "no test split",
        "no captions",
        "path outside",
    ],
)
def test_unusable_data_is_told_before_anything_is_written(
    damage: Callable[[Path], None],
    named: str,
    own_world: Path,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(own_world)
    assert train_main(train_flags(tmp_path / "logs", "--root_dir", str(own_world))) == 2
    assert named in one_error(capsys)
    assert not (tmp_path / "logs").exists()


def test_caption_of_a_person_without_image_is_named(
    own_world: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The image-to-text direction needs a caption for the person of every image.
    damage_annotations(own_world, lambda records: records[-1].update(captions=[], id=777))
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--root_dir", str(own_world), "--i2t"]
    assert run_test(flags) == 2
    assert "777" in one_error(capsys)


def test_unreadable_image_ends_the_run_with_its_name(
    own_world: Path, tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    image = own_world / "CUHK-PEDES" / "imgs" / "cam_a" / "0001_0.png"
    image.write_bytes(b"")
    assert train_main(train_flags(tmp_path / "logs", "--root_dir", str(own_world))) == 2
    assert str(image) in one_error(capsys)
    flags = train_flags(tmp_path / "logs", "--root_dir", str(own_world), "--bad_images", "skip", "--num_workers", "1")
    assert train_main(flags) == 0
    shown = capsys.readouterr()
    assert shown.out.count("the next item takes their place") == 1 and str(image) in shown.out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text_length", "40"], "--text_length 40"),
        (["--vocab_size", "100"], "--vocab_size 100"),
        (["--img_size", "8,8"], "--img_size 8,8"),
        (["--lfa_heads", "3"], "--lfa_heads 3"),
        (["--pretrain_choice", "RN50"], "RN50"),
        (["--pretrain_choice", "ViT-H/99"], "ViT-H/99"),
        (["--pretrain_choice", "/nowhere/clip.pt"], "/nowhere/clip.pt"),
        (["--sampler", "identity", "--batch_size", "64", "--num_instance", "2"], "--num_instance"),
        (["--loss_names", "sdm+mlm", "--root_dir", "/nowhere"], "/nowhere"),
    ],
)
def test_flags_that_do_not_fit_model_or_data_leave_no_run_behind(
    flags: list[str],
    named: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_main(train_flags(tmp_path / "logs", *flags)) == 2
    assert named in one_error(capsys)
    assert not (tmp_path / "logs").exists()


class _Payload:
    """Creates a file when it is un-pickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def hostile(path: Path) -> None:
    torch.save({"model": _Payload(path.parent / "executed")}, path)


def hostile_plain(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload(path.parent / "executed")))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def key_lost(path: Path) -> None:
    stored = torch.load(path, weights_only=True)
    del stored["model"]["safl.part_tokens"]
    torch.save(stored, path)


def key_added(path: Path) -> None:
    stored = torch.load(path, weights_only=True)
    stored["model"]["stranger.weight"] = torch.zeros(2)
    torch.save(stored, path)


def reshaped(path: Path) -> None:
    stored = torch.load(path, weights_only=True)
    stored["model"]["safl.part_tokens"] = torch.zeros(7, 64)
    torch.save(stored, path)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.write_bytes(b""), "best.pth"),
        (lambda path: path.write_bytes(b"hello"), "best.pth"),
        (truncated, "best.pth"),
        (flipped, "best.pth"),
        (hostile, "best.pth"),
        (hostile_plain, "best.pth"),
        (lambda path: torch.save({"epoch": 3}, path), "best.pth"),
        (lambda path: torch.save({"layer.weight": torch.zeros(2, 2)}, path), "best.pth"),
        (key_lost, "safl.part_tokens"),
        (key_added, "stranger.weight"),
        (reshaped, "safl.part_tokens"),
    ],
    ids=[
        "empty",
        "text",
        "truncated",
        "bit flipped",
        "hostile archive",
        "hostile pickle",
        "no weights",
        "another model",
        "missing key",
        "unknown key",
        "wrong shape",
    ],
)
def test_unusable_checkpoint_is_refused_by_test_and_by_resume(
    damage: Callable[[Path], None],
    named: str,
    trained_run: Path,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "best.pth"
    shutil.copy(trained_run / "best.pth", checkpoint)
    damage(checkpoint)
    report = tmp_path / "report"
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--checkpoint", str(checkpoint)]
    assert run_test([*flags, "--report_dir", str(report)]) == 2
    message = one_error(capsys)
    assert named in message
    assert str(checkpoint) in message
    assert not report.exists()
    logs = tmp_path / "logs"
    assert train_main([*train_flags(logs), "--resume", "--resume_ckpt_file", str(checkpoint)]) == 2
    assert named in one_error(capsys)
    assert not logs.exists()
    assert not (tmp_path / "executed").exists()


def test_pickled_objects_need_an_explicit_word_of_trust(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "best.pth"
    torch.save(
        {**torch.load(trained_run / "best.pth", weights_only=True), "args": argparse.Namespace(lr=1e-5)}, checkpoint
    )
    report = tmp_path / "report"
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--checkpoint", str(checkpoint)]
    flags += ["--report_dir", str(report)]
    assert run_test(flags) == 2
    message = one_error(capsys)
    assert "Namespace" in message
    assert "--trust-checkpoint" in message
    assert run_test([*flags, "--trust-checkpoint"]) == 0
    assert (report / "evaluation.json").is_file()


def test_missing_checkpoint_and_configuration_are_named(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--checkpoint", str(tmp_path / "none.pth")]
    assert run_test(flags) == 2
    assert str(tmp_path / "none.pth") in one_error(capsys)
    assert run_test(["--config_file", str(tmp_path / "configs.yaml")]) == 2
    assert str(tmp_path / "configs.yaml") in one_error(capsys)
    assert run_test(["--config_file", str(trained_run)]) == 2
    assert "is a folder" in one_error(capsys)


def test_tiny_clip_of_an_impossible_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cmlfa_tiny_main(["--out", str(tmp_path / "tiny.pt"), "--width", "100"]) == 2
    assert "--width" in one_error(capsys)
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert train_main(train_flags(tmp_path / "file")) == 1
    assert str(tmp_path / "file") in one_error(capsys)


def test_full_disk_keeps_the_last_good_checkpoint(
    trained_run: Path, tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk: the write of the checkpoint fails half-way."""
    run = tmp_path / "CUHK-PEDES" / trained_run.name
    shutil.copytree(trained_run, run)
    before = {name: (run / name).read_bytes() for name in ("last.pth", "best.pth")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pth"]) // 2, hard))
    try:
        status = train_main([*train_flags(tmp_path, "--num_epoch", "3"), "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert ".pth" in one_error(capsys)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*"))
    assert train_main([*train_flags(tmp_path, "--num_epoch", "3"), "--resume"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_there_is_named(
    tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(train_flags(tmp_path / "logs", "--device", "cuda")) == 2
    assert "--device cuda" in one_error(capsys)


def test_help_and_wrong_paths_are_answered_without_importing_torch() -> None:
    calls = [
        ("train_main", ["--help"], 0),
        ("test_main", ["--help"], 0),
        ("visualize_main", ["--help"], 0),
        ("cmlfa_tiny_main", ["--help"], 0),
        ("index_main", ["--help"], 0),
        ("search_main", ["--help"], 0),
        ("cmlfa_toy_main", ["--help"], 0),
        ("train_main", ["--no_such_flag"], 2),
        ("train_main", ["--root_dir", "/nowhere", "--MLM"], 2),
        ("test_main", ["--config_file", "/nowhere/configs.yaml"], 2),
        ("test_main", [], 2),
        ("search_main", ["--text", "red"], 2),
    ]
    script = f"""
import sys
from cmlfa.cli import *
from tbps_world.cli import *
for name, flags, _ in {calls!r}:
    print("CALL", flush=True)
    try:
        status = globals()[name](flags)
    except SystemExit as ended:
        status = ended.code
    assert "torch" not in sys.modules and "matplotlib" not in sys.modules, (name, flags)
    print("STATUS", status, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for shown, (_, _, status) in zip(done.stdout.split("CALL\n")[1:], calls, strict=True):
        assert shown.endswith(f"STATUS {status}\n")
        assert status or "--" in shown
