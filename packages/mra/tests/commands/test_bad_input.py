"""What a user sees of a mistake or a fault: one sentence, the right exit status, and nothing half-written."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mra.cli import retrieval_main, run_main
from tbps_world.cli import mra_tiny_main

Flags = Callable[..., list[str]]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is told; no traceback."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def own_world(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world that a test may damage, as the working directory; pictures are shared."""
    root = tmp_path / "world"
    root.mkdir()
    for name in ("configs", "data"):
        shutil.copytree(world / name, root / name)
    (root / "images").symlink_to(world / "images")
    monkeypatch.chdir(root)
    return root


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def change_yaml(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def first(**values: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda records: [{**records[0], **values}, *records[1:]]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


TRAIN = Path("data/finetune/cuhk_train.json")
TEST = Path("data/finetune/cuhk_test.json")

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no images": (lambda root: (root / "images").unlink(), "images/CUHK-PEDES/imgs"),
    "no training file": (lambda root: (root / TRAIN).unlink(), "cuhk_train.json"),
    "no test file": (lambda root: (root / TEST).unlink(), "cuhk_test.json"),
    "cut JSON": (lambda root: (root / TRAIN).write_text((root / TRAIN).read_text()[:5000]), "cut short"),
    "empty JSON": (lambda root: (root / TEST).write_text(""), "cuhk_test.json is empty"),
    "UTF-16": (lambda root: (root / TEST).write_text("[]", encoding="utf-16"), "UTF-16"),
    "files exchanged": (lambda root: shutil.copy(root / TEST, root / TRAIN), "holds a list, as evaluation files do"),
    "key missing": (lambda root: change_json(root / TRAIN, lambda r: [{"image": "a"}, *r]), "'caption'"),
    "path outside": (lambda root: change_json(root / TRAIN, first(image="../../secret.png")), "climbs out"),
    "image missing": (lambda root: change_json(root / TRAIN, first(image="cam_a/none.png")), "cam_a/none.png"),
    "empty caption": (lambda root: change_json(root / TRAIN, first(caption="")), "is empty"),
    "blank caption": (lambda root: change_json(root / TRAIN, first(caption="   ")), "'   '"),
    "blank caption to find": (
        lambda root: change_json(root / TEST, lambda r: [{**r[0], "caption": ["a man", " "]}, *r[1:]]),
        "cuhk_test.json",
    ),
    "nothing to train": (lambda root: (root / TRAIN).write_text("[]"), "0 pairs"),
    "too few pairs": (lambda root: change_json(root / TRAIN, lambda r: r[:10]), "10 pairs"),
    "nothing to find": (
        lambda root: change_json(root / TEST, lambda r: [{**e, "caption": []} for e in r]),
        "nothing can be evaluated",
    ),
    "no vocabulary": (lambda root: (root / "data/bert-base-uncased/vocab.txt").unlink(), "vocab.txt"),
    "other vocabulary": (
        lambda root: append(root / "data/bert-base-uncased/vocab.txt", "more\nwords\n"),
        "vocab.txt holds",
    ),
    "no synonyms": (lambda root: (root / "data/synonyms.json").unlink(), "synonyms.json"),
    "odd synonyms": (lambda root: (root / "data/synonyms.json").write_text('{"a": "b"}'), "synonyms of 'a'"),
    "broken YAML": (
        lambda root: change_yaml(root / "configs/cuhk.yaml", "max_tokens: 32", "max_tokens: ["),
        "cuhk.yaml",
    ),
    "key of YAML missing": (lambda root: change_yaml(root / "configs/cuhk.yaml", "k_test: 8", ""), "k_test"),
    "no sizes": (lambda root: (root / "configs/config_bert_tiny.json").unlink(), "config_bert_tiny.json"),
    "sizes disagree": (lambda root: change_yaml(root / "configs/cuhk.yaml", "\nw: 96", "\nw: 64"), "96 and 96"),
    "no checkpoint": (lambda root: (root / "data/checkpoint/pretrain.pth").unlink(), "pretrain.pth is not a file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_unusable_data_is_told_before_anything_is_started_or_written(
    name: str, own_world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, named = DAMAGES[name]
    damage(own_world)
    assert retrieval_main(flags("cuhk", "out")) == 2
    assert named in one_error(capsys)
    assert run_main(["--task", "cuhk", "--output_dir", "out", "--device", "cpu"]) == 2
    assert named in one_error(capsys)
    assert not (own_world / "out").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: (root / "data/sda/sda_5000_10000.json").unlink(), "sda_5000_10000.json"),
        (lambda root: (root / "data/swin_base_patch4_window7_224_22k.pth").unlink(), "patch4_window7_224_22k.pth"),
        (lambda root: (root / "data/bert-base-uncased/model.safetensors").unlink(), "model.safetensors"),
        (
            lambda root: change_json(
                root / "data/sda/sda_0_5000.json", first(boxes=[[1, 2]], logits=[1], phrases=["a"])
            ),
            "boxes",
        ),
        (lambda root: change_json(root / "data/sda/sda_0_5000.json", first(logits=[])), "as long as"),
        (
            lambda root: change_json(
                root / "data/sda/sda_0_5000.json", first(boxes=[[0.5, 0.5, 1, 1]], logits=[1], phrases=["\t"])
            ),
            "'\\t'",
        ),
    ],
)
def test_missing_parts_of_pretraining_are_named(
    damage: Callable[[Path], object], named: str, own_world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(own_world)
    assert retrieval_main(flags("sda", "out")) == 2
    assert named in one_error(capsys)
    assert not (own_world / "out").exists()


def test_caption_that_cleaning_empties_is_named_before_training(
    own_world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signs alone are a caption for cuhk, and nothing for icfg, whose captions keep letters and digits."""
    for task, status in (("icfg", 2), ("cuhk", 0)):
        change_json(own_world / f"data/finetune/{task}_train.json", first(caption="\u4eba !?"))
        more = ["--epo", "1", "--bs", "24"]
        assert retrieval_main(flags(task, f"out/{task}", *more)) == status
        if status:
            assert "icfg_rstp keeps letters" in one_error(capsys)


@pytest.mark.parametrize(
    ("task", "more", "named"),
    [
        ("cuhk", ["--checkpoint", "gone.pth"], "--checkpoint gone.pth"),
        ("cuhk", ["--checkpoint", "data"], "--checkpoint data"),
        ("cuhk", ["--checkpoint", ""], "--checkpoint"),
        ("cuhk", ["--resume"], "--resume found no"),
        ("cuhk", ["--resume", "--evaluate"], "--resume"),
        ("icfg", ["--select", "val"], "--select val"),
        ("cuhk", ["--region", "0.8"], "region"),
        ("cuhk", ["--bs", "1000"], "--bs"),
        ("cuhk", ["--config", "configs/none.yaml"], "configs/none.yaml"),
        ("cuhk", ["--output_dir", "configs/cuhk.yaml/out"], "configs/cuhk.yaml is a file"),
        ("reid", ["--config", "configs/cuhk.yaml"], "--task reid"),
    ],
)
def test_flags_that_cannot_work_are_named(
    task: str,
    more: list[str],
    named: str,
    in_world: Path,
    tmp_path: Path,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert retrieval_main(flags(task, tmp_path / "out", *more)) == 2
    assert named in one_error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--bs", "-1"],
        ["--lr", "nan"],
        ["--seed", "-1"],
        ["--seed", "4294967295"],
        ["--epo", "two"],
        ["--device", "gpu"],
        ["--select", "train"],
        ["--region_feat", "best"],
        ["--no_such_flag"],
    ],
)
def test_values_that_no_flag_takes_are_refused_while_parsing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


class _Payload:
    """Creates a folder when it is un-pickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = torch.load(path, weights_only=True)
    change(stored)
    torch.save(stored, path)


CHECKPOINT_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("not found"),
    "hostile": lambda path: torch.save({"model": _Payload(path.parent / "executed")}, path),
    "hostile plain": lambda path: path.write_bytes(pickle.dumps(_Payload(path.parent / "executed"))),
    "key lost": lambda path: rewritten(path, lambda stored: stored["model"].pop("itm_head.0.weight")),
    "key added": lambda path: rewritten(path, lambda stored: stored["model"].update(stranger=torch.zeros(2))),
    "reshaped": lambda path: rewritten(
        path, lambda stored: stored["model"].update({"itm_head.3.bias": torch.zeros(3)})
    ),
    "no weights": lambda path: torch.save({"epoch": 3}, path),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGES)
@pytest.mark.parametrize("evaluate", [False, True])
def test_unusable_checkpoint_is_named_and_runs_no_code(
    name: str, evaluate: bool, own_world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_world / "data/checkpoint/ft_cuhk.pth"
    CHECKPOINT_DAMAGES[name](path)
    more = ["--checkpoint", "data/checkpoint/ft_cuhk.pth", *(["--evaluate"] if evaluate else [])]
    assert retrieval_main(flags("cuhk", "out", *more)) == 2
    assert "ft_cuhk.pth" in one_error(capsys)
    assert not (path.parent / "executed").exists()
    assert not (own_world / "out").exists()


@pytest.mark.parametrize("name", ["empty", "truncated", "hostile", "no weights"])
def test_unusable_state_is_not_resumed(
    name: str, trained: Path, in_world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    CHECKPOINT_DAMAGES[name](tmp_path / "run" / "last.pth")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert retrieval_main(flags("cuhk", tmp_path / "run", "--resume", "--epo", "3")) == 2
    assert "last.pth" in one_error(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "executed"} == before
    assert not (tmp_path / "run" / "executed").exists()


def test_full_disk_keeps_the_last_good_state(
    trained: Path, in_world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk: the write of the checkpoint fails half-way."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {name: (run / name).read_bytes() for name in ("last.pth", "checkpoint_best.pth", "log.txt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pth"]) // 2, hard))
    try:
        status = retrieval_main(flags("cuhk", run, "--resume", "--epo", "3"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert "last.pth" in one_error(capsys)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*"))
    assert retrieval_main(flags("cuhk", run, "--resume", "--epo", "3")) == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_image_ends_the_run_with_its_name(
    workers: str, own_world: Path, world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    name = json.loads((own_world / TRAIN).read_text())[0]["image"]
    (own_world / "images").unlink()
    shutil.copytree((world / "images/CUHK-PEDES").resolve(), own_world / "images/CUHK-PEDES", symlinks=False)
    (own_world / "images/CUHK-PEDES/imgs" / name).write_bytes(b"")
    words = flags("cuhk", "out", "--num_workers", workers)
    assert retrieval_main(words) != 0
    assert name in one_error(capsys)
    assert retrieval_main([*words, "--bad_images", "skip"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the next item takes their place") == 1 and name in shown


def test_loss_that_is_not_finite_stops_the_run(
    own_world: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_world / "data/checkpoint/pretrain.pth"
    rewritten(path, lambda stored: stored["model"]["temp"].fill_(float("nan")))
    assert retrieval_main(flags("cuhk", "out")) == 1
    error = one_error(capsys)
    assert "not a finite number in epoch 0, iteration 0" in error and "--lr" in error
    assert not list((own_world / "out").glob("*.pth"))


def test_missing_wordnet_is_told_with_the_command_that_fetches_it(own_world: Path, flags: Flags) -> None:
    """In a process of its own: WordNet stays loaded once it has been found."""
    change_yaml(own_world / "configs/cuhk.yaml", "synonyms: data/synonyms.json", "")
    empty = own_world / "nltk"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "NLTK_DATA"}
    program = (
        "import sys, nltk\n"
        f"nltk.data.path[:] = [{str(empty)!r}]\n"
        "from mra.cli import retrieval_main\n"
        f"status = retrieval_main({flags('cuhk', 'out')!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "python -m nltk.downloader wordnet" in done.stderr and done.stderr.count("\n") == 1
    # Pre-training and evaluation do not augment.
    assert retrieval_main(flags("cuhk", "out", "--evaluate", "--checkpoint", "data/checkpoint/ft_cuhk.pth")) == 0


def test_lexicon_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mra_tiny_main(["--out", str(tmp_path / "T"), "--lexicon", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in one_error(capsys)
    (tmp_path / "empty.txt").write_text("\n")
    assert mra_tiny_main(["--out", str(tmp_path / "T"), "--lexicon", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt" in one_error(capsys)
    assert mra_tiny_main(["--out", str(tmp_path / "empty.txt"), "--lexicon", str(tmp_path / "none.txt")]) == 2
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize(
    "call",
    [
        "run_main(['--help'])",
        "retrieval_main(['--help'])",
        "mra_tiny_main(['--help'])",
        "mra_toy_main(['--help'])",
        "run_main(['--task', 'nothing'])",
        "run_main(['--dist', 'f5'])",
        "run_main([])",
        "retrieval_main(['--config', 'none', '--task', 'cuhk', '--output_dir', 'o'])",
    ],
)
def test_help_and_wrong_paths_are_answered_without_importing_torch(call: str, tmp_path: Path) -> None:
    script = f"""
import sys
from mra.cli import *
from tbps_world.cli import *
try:
    status = {call}
except SystemExit as ended:
    status = ended.code
assert "torch" not in sys.modules and "transformers" not in sys.modules and "nltk" not in sys.modules
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "AssertionError" not in done.stderr
    assert done.returncode == (0 if "--help" in call else 2)
    assert "Traceback" not in done.stderr
