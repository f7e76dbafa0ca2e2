"""fafa-itcpr prepare: from the layouts of the three downloads to the tree of the README."""

import json
import shutil
from pathlib import Path

import pytest

from fafa.cli import itcpr_main


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """Unpacked downloads of all three sources and the annotation, one level deeper than one might think."""
    files = {
        "celeb/Celeb-reID/gallery/12_1_0.jpg": "Celeb-reID/012/12_1_0.jpg",
        "celeb/Celeb-reID/gallery/1052_3_0.jpg": "Celeb-reID/1052/1052_3_0.jpg",
        "celeb/Celeb-reID/query/12_2_0.jpg": "Celeb-reID/012/12_2_0.jpg",
        "celeb/Celeb-reID/train/5_2_0.jpg": None,
        "celeb/Celeb-reID/query/notes.txt": None,
        "prcc/prcc/rgb/test/A/001/cropped_rgb1.jpg": "PRCC/test/A/001/cropped_rgb1.jpg",
        "prcc/prcc/rgb/train/002/A_1.jpg": "PRCC/train/002/A_1.jpg",
        "prcc/prcc/sketch/train/002/2.jpg": None,
        "last/train/000000/000000_1.jpg": "LAST/000000/000000_1.jpg",
        "last/test/gallery/000123/7.jpg": "LAST/000123/7.jpg",
        "last/test/gallery/list.txt": None,
    }
    root = tmp_path / "downloads"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    paths = [target for target in files.values() if target]
    record = {"datasets": "x", "person_id": 1, "instance_id": 1}
    (root / "hub").mkdir()
    (root / "hub" / "query.json").write_text(json.dumps([{**record, "file_path": paths[0], "caption": "in red"}]))
    (root / "hub" / "gallery.json").write_text(json.dumps([{**record, "file_path": path} for path in paths]))
    (root / "expected.json").write_text(json.dumps({target: source for source, target in files.items() if target}))
    return root


def prepare(downloads: Path, out: Path, *more: str) -> int:
    flags = ["--annotations", "hub", "--celeb-reid", "celeb", "--prcc", "prcc", "--last", "last"]
    flags = [flag if flag.startswith("--") else str(downloads / flag) for flag in flags]
    return itcpr_main(["prepare", "--out", str(out), *flags, *more])


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_every_image_comes_to_its_place(
    mode: str, downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ITCPR"
    assert prepare(downloads, out, "--mode", mode) == 0
    expected = json.loads((downloads / "expected.json").read_text())
    placed = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert placed == {*expected, "query.json", "gallery.json"}
    for target, source in expected.items():
        assert (out / target).read_bytes() == source.encode()
        assert (out / target).is_symlink() is (mode == "symlink")
    shown = capsys.readouterr().out
    assert "--celeb-reid: 3 files placed" in shown
    assert "complete: 7 images" in shown
    assert prepare(downloads, out, "--mode", mode) == 0
    assert "--celeb-reid: 0 files placed, 3 there already" in capsys.readouterr().out


def test_what_is_missing_is_counted_by_source(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ITCPR"
    flags = ["prepare", "--out", str(out), "--prcc", str(downloads / "prcc")]
    assert itcpr_main(flags) == 0
    assert "has no annotation yet" in capsys.readouterr().out
    assert itcpr_main([*flags, "--annotations", str(downloads / "hub")]) == 1
    assert "5 of 7 images are missing (3 of Celeb-reID, 2 of LAST" in capsys.readouterr().out


def test_a_cut_off_copy_is_made_again(downloads: Path, tmp_path: Path) -> None:
    out = tmp_path / "ITCPR"
    assert prepare(downloads, out) == 0
    damaged = out / "LAST" / "000123" / "7.jpg"
    damaged.write_bytes(b"la")
    assert prepare(downloads, out) == 0
    assert damaged.read_bytes() == b"last/test/gallery/000123/7.jpg"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing to prepare"),
        (["--last", "nowhere"], "--last nowhere is not a folder"),
        (["--last", "hub"], "no files in folders named by numbers"),
        (["--celeb-reid", "last"], "no folder gallery or query"),
        (["--prcc", "hub"], "no folder rgb"),
        (["--annotations", "last"], "holds no query.json"),
    ],
)
def test_wrong_downloads_are_named(
    flags: list[str], said: str, downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if said == "no folder gallery or query":
        shutil.rmtree(downloads / "last" / "test")
    known = {path.name for path in downloads.iterdir()}
    flags = [str(downloads / flag) if flag in known else flag for flag in flags]
    assert itcpr_main(["prepare", "--out", str(tmp_path / "out"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_two_pictures_for_one_place_are_refused(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = downloads / "last" / "val" / "000123" / "7.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another picture of the same name")
    assert prepare(downloads, tmp_path / "out") == 2
    assert "both belong to LAST/000123/7.jpg and differ" in capsys.readouterr().err
