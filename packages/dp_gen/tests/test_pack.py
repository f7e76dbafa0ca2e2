"""dp-pack: generated images as a data set that the retrieval packages read and train on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dp_gen.pack import main
from tbps_common.datasets import CUHKPEDES, load_processed_train
from tbps_common.datasets.finetune import convert_to_finetune
from tbps_world.cli import synth_main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    assert synth_main(["--out", str(root), "--preset", "tiny", "--ids", "10", "--layouts", "cuhk"]) == 0
    return root


def write_generated(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 64), (len(row["file"]) * 7 % 255, 90, 200)).save(path)
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edit(name: str, person: int | None, **more: Any) -> dict[str, Any]:
    return {
        **{"file": f"imgs/{name}.jpg", "kind": "edit", "source": name.split("_")[0], "person": person},
        **{"caption": f"own {name}", "base_description": f"original of {name}"},
        **{"reference_attribute_list": ["a skirt"], **more},
    }


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    rows = [
        edit("000000000_0", 1),
        edit("000000000_1", 1),
        edit("000000004_0", 2),
        edit("000000009_0", None),
        {**edit("x", None), "file": "output_0.png", "kind": "new", "description_number": 0},
        {**edit("x", None), "file": "output_1.png", "kind": "new", "description_number": 0},
        {**edit("x", None), "file": "output_2.png", "kind": "new", "description_number": 1},
    ]
    write_generated(tmp_path / "generated", rows)
    return tmp_path / "generated"


def annotate(generated: Path, path: Path, skip: tuple[int, ...] = ()) -> Path:
    rows = [json.loads(line) for line in (generated / "edits.jsonl").read_text().splitlines()]
    lines = [
        json.dumps({**row, "index": number, "instruction": "...", "output": f"Rewritten caption of {row['file']}."})
        for number, row in enumerate(rows)
        if number not in skip
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_generated_images_alone(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = annotate(generated, tmp_path / "a.jsonl", skip=(3,))
    flags = ["--generated", str(generated), "--annotations", str(annotations), "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    assert "1 images have no caption" in capsys.readouterr().out
    data = CUHKPEDES(tmp_path / "out", verbose=False)
    assert [record["id"] for record in data.train_annos] == [1, 1, 2, 3, 3, 4]
    assert [captions for *_, captions in data.train][0] == "Rewritten caption of imgs/000000000_0.jpg."
    assert all(Path(path).is_file() for _, _, path, _ in data.train)
    convert_to_finetune("CUHK-PEDES", tmp_path / "out", tmp_path / "finetune")  # what MRA reads
    images = tmp_path / "out" / "CUHK-PEDES" / "imgs"
    processed = load_processed_train([tmp_path / "finetune" / "cuhk_train.json"], images)
    assert processed.captions == [caption for *_, caption in data.train] and processed.n_labels == 4
    assert processed.image_paths == [path for _, _, path, _ in data.train]


def test_added_to_a_data_set(generated: Path, base: Path, tmp_path: Path) -> None:
    annotations = annotate(generated, tmp_path / "a.jsonl")
    before = CUHKPEDES(base, verbose=False)
    last = max(record["id"] for record in [*before.train_annos, *before.val_annos, *before.test_annos])
    flags = ["--generated", str(generated), "--annotations", str(annotations), "--base", str(base)]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    after = CUHKPEDES(tmp_path / "out", verbose=False)
    added = after.train_annos[len(before.train_annos) :]
    assert after.train_annos[: len(before.train_annos)] == before.train_annos
    assert after.test["captions"] == before.test["captions"] and after.val["captions"] == before.val["captions"]
    assert [record["id"] for record in added] == [1, 1, 2, last + 1, last + 2, last + 2, last + 3]
    for _, _, path, _ in after.train:
        assert Path(path).is_file()
    assert main([*flags, "--out", str(tmp_path / "new"), "--new_ids", "--copy_base"]) == 0
    fresh = CUHKPEDES(tmp_path / "new", verbose=False).train_annos[len(before.train_annos) :]
    assert [record["id"] for record in fresh] == [last + n for n in (1, 2, 3, 4, 5, 5, 6)]
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))


def test_a_kill_leaves_no_half_of_a_data_set(generated: Path, tmp_path: Path) -> None:
    """Killed while it copies: nothing stands under the final name, and the next run clears up and completes."""
    program = (
        "import os, shutil, signal\n"
        "from dp_gen.pack import main\n"
        "copy = shutil.copyfile\n"
        "shutil.copyfile = lambda source, target: (copy(source, target), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"main(['--generated', {str(generated)!r}, '--captions', 'own', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    left = list((tmp_path / "out").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".CUHK-PEDES.tmp")
    assert main(["--generated", str(generated), "--captions", "own", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["CUHK-PEDES"]


def test_a_person_of_the_test_split_never_enters_training(base: Path, tmp_path: Path) -> None:
    tested = CUHKPEDES(base, verbose=False).test_annos[0]["id"]
    write_generated(tmp_path / "generated", [edit("000000000_0", tested)])
    flags = ["--generated", str(tmp_path / "generated"), "--captions", "own", "--base", str(base)]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    data = CUHKPEDES(tmp_path / "out", verbose=False)
    assert data.train_annos[-1]["id"] not in {record["id"] for record in data.test_annos}
    assert data.train_annos[-1]["captions"] == ["own 000000000_0"]


def test_annotations_of_another_run_are_refused(
    generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = annotate(generated, tmp_path / "a.jsonl")
    annotations.write_text(annotations.read_text().replace("original of 000000004_0", "something else"))
    flags = ["--generated", str(generated), "--annotations", str(annotations), "--out", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "another edits.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "problem", ["no annotations", "no manifest", "missing image", "climb", "exists", "no captions"]
)
def test_bad_input_is_one_line(
    problem: str, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = annotate(generated, tmp_path / "a.jsonl")
    flags = ["--generated", str(generated), "--out", str(tmp_path / "out")]
    if problem != "no annotations":
        flags += ["--annotations", str(annotations)]
    if problem == "no manifest":
        (generated / "edits.jsonl").unlink()
    if problem == "missing image":
        (generated / "output_2.png").unlink()
    if problem == "climb":
        (generated / "edits.jsonl").write_text('{"file": "../a.jsonl"}\n')
    if problem == "exists":
        (tmp_path / "out" / "CUHK-PEDES").mkdir(parents=True)
    if problem == "no captions":
        annotations.write_text("")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("error: ")
    assert problem == "exists" or not (tmp_path / "out" / "CUHK-PEDES").exists()


@pytest.fixture
def packed(generated: Path, base: Path, tmp_path: Path) -> Path:
    """The base data set with the generated images added."""
    annotations = annotate(generated, tmp_path / "a.jsonl")
    flags = ["--generated", str(generated), "--annotations", str(annotations), "--base", str(base)]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def run_sibling(name: str, *flags: str, cwd: Path) -> str:
    """A sibling package is used as its users do: through its command, never by import."""
    command = Path(sys.executable).with_name(name)
    if not command.is_file():
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([command, *flags], capture_output=True, text=True, env=environment, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_cmlfa_trains_on_the_packed_data(packed: Path, tmp_path: Path) -> None:
    run_sibling("cmlfa-make-tiny-clip", "--out", "clip.pt", "--layers", "1", cwd=tmp_path)
    flags = ["--root_dir", str(packed), "--dataset_name", "CUHK-PEDES", "--output_dir", "logs"]
    flags += [
        "--pretrain_choice",
        "clip.pt",
        "--loss_names",
        "sdm+id+itc",
        "--img_size",
        "64,32",
        "--text_length",
        "20",
    ]
    flags += ["--cmt_depth", "1", "--lfa_layers", "1", "--lfa_heads", "2", "--batch_size", "8", "--num_epoch", "1"]
    run_sibling("cmlfa-train", *flags, "--num_workers", "0", "--device", "cpu", cwd=tmp_path)
    assert list((tmp_path / "logs").glob("*/*/last.pth"))


@pytest.mark.slow
def test_mra_trains_on_the_packed_data(packed: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "CUHK-PEDES", "--root_dir", str(packed), "--to", "finetune", "--out", "data/finetune"]
    run_sibling("tbps-data", "convert", *flags, "--link_images", "images", cwd=tmp_path)
    run_sibling("mra-make-tiny", "--out", ".", "--lexicon", str(base / "lexicon.txt"), cwd=tmp_path)
    flags = ["--task", "cuhk", "--dist", "gpu0", "--output_dir", "out", "--checkpoint", "data/checkpoint/pretrain.pth"]
    said = run_sibling("mra-run", *flags, "--device", "cpu", "--num_workers", "0", cwd=tmp_path)
    assert "Train Epoch: [0]" in said and (tmp_path / "out" / "checkpoint_best.pth").is_file()
