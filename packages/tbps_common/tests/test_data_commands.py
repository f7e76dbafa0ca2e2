"""`tbps-data check` and `tbps-data convert` on small trees of every layout, sound and damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tbps_common.cli import data_main
from tbps_common.datasets import DATASETS, load_processed_eval, load_processed_train
from tbps_common.datasets.check import check_dataset, count_long_captions
from tbps_common.datasets.commands import ALL_NAMES, RAW_NAMES
from tbps_common.datasets.finetune import FINETUNE_IMAGES
from tbps_common.datasets.inventory import INVENTORIES, PUBLISHED, Size
from tbps_common.datasets.mals import SHARDS as MALS_SHARDS
from tbps_common.datasets.sda import SHARDS as SDA_SHARDS

TURN = [{"from": "gpt", "value": "Colour?"}, {"from": "user", "value": "Red."}]


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def draw(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((16, 32), 40).convert("RGB").save(path)
    return str(path)


def make_raw(root: Path, name: str) -> None:
    """Three training persons, one for val (not for ICFG), two for test; two images each, one or two captions."""
    key = "img_path" if name == "RSTPReid" else "file_path"
    first = 1 if name == "CUHK-PEDES" else 0
    splits = ["train"] * 3 + (["test"] if name == "ICFG-PEDES" else ["val"]) + ["test"] * 2
    captions = 1 if name == "ICFG-PEDES" else 2
    records = []
    for person, split in enumerate(splits):
        for view in range(2):
            image = f"cam_{view}/{person}.png"
            draw(root / name / "imgs" / image)
            texts = [f"Person {person} seen {view}, text {i}: red coat." for i in range(captions)]
            records.append({"split": split, "id": person + first, key: image, "captions": texts})
    records.reverse()
    anno = {"CUHK-PEDES": "reid_raw.json", "ICFG-PEDES": "ICFG-PEDES.json", "RSTPReid": "data_captions.json"}[name]
    write(root / name / anno, records)


def make_finetune(root: Path) -> None:
    for name in RAW_NAMES:
        make_raw(root / "raw", name)
        assert data_main(
            ["convert", "--dataset", name, "--root_dir", str(root / "raw"), "--to", "finetune"]
            + ["--out", str(root / "data" / "finetune"), "--link_images", str(root / "images")]
        ) == 0  # fmt: skip


def make_sda(root: Path) -> None:
    for number, shard in enumerate(SDA_SHARDS):
        draw(root / "images" / "SDA" / f"c_{number}" / "0.png")
        record = {"image": f"c_{number}/0.png", "boxes": [[0.5, 0.5, 1, 1]], "logits": [0.5], "phrases": ["a man"]}
        write(root / "data" / "sda" / shard, [record | {"caption": f"a man, {number}", "image_id": number}])


def make_syncpr(root: Path) -> None:
    records = []
    for i in range(4):
        names = [f"test1/sub_img/img_{side}/{i}-0_{side}.png" for side in ("left", "right")]
        for image in names:
            draw(root / "SynCPR" / image)
        paths = {"reference_image_path": names[0], "target_image_path": names[1]}
        records.append(paths | {"edit_caption": f"edit {i}", "cpr_id": i // 2})
    write(root / "SynCPR" / "SynCPR.json", records)


def make_itcpr(root: Path) -> None:
    def entry(image: str, person: int, instance: int) -> dict:
        draw(root / "ITCPR" / image)
        source = image.split("/")[0]
        return {"file_path": image, "datasets": source, "person_id": person, "instance_id": instance}

    queries = [("Celeb-reID/1/q.png", 1, 0), ("LAST/2/q.png", 1, 1)]
    gallery = [("Celeb-reID/1/g.png", 1, 0), ("LAST/2/g.png", 1, 1), ("PRCC/3/g.png", 3, -1)]
    write(root / "ITCPR" / "query.json", [entry(*query) | {"caption": "a red coat"} for query in queries])
    write(root / "ITCPR" / "gallery.json", [entry(*item) for item in gallery])


def make_chatpedes(root: Path) -> None:
    for person, split in enumerate(["train", "test"]):
        draw(root / "ChatPedes" / "imgs" / f"{person}.png")
        record = {"id": person, "file_path": f"{person}.png", "chats": [[TURN, TURN], [TURN]]}
        write(root / "ChatPedes" / f"{split}_reid.json", [record, record | {"chats": []}])


def make_mals(root: Path) -> None:
    draw(root / "MALS" / "gene_crop" / "0.png")
    for number, shard in enumerate(MALS_SHARDS):
        pair = {"image": "gene_crop/0.png", "caption": "a boy", "image_id": "c_0"}
        write(root / "MALS" / "gene_attrs" / shard, [] if number else [pair])


MAKERS = {
    **{name: (lambda root, name=name: make_raw(root, name)) for name in RAW_NAMES},
    "finetune": make_finetune,
    "SDA": make_sda,
    "SynCPR": make_syncpr,
    "ITCPR": make_itcpr,
    "ChatPedes": make_chatpedes,
    "MALS": make_mals,
}
SIZES = {
    "CUHK-PEDES": {"train": [3, 6, 12], "val": [1, 2, 4], "test": [2, 4, 8], "all": [6, 12, 24]},
    "ICFG-PEDES": {"train": [3, 6, 6], "val": [0, 0, 0], "test": [3, 6, 6], "all": [6, 12, 12]},
    "RSTPReid": {"train": [3, 6, 12], "val": [1, 2, 4], "test": [2, 4, 8], "all": [6, 12, 24]},
    "finetune": {
        **{
            f"cuhk {split}": sizes
            for split, sizes in {"train": [3, 6, 12], "val": [1, 2, 4], "test": [2, 4, 8]}.items()
        },
        **{f"icfg {split}": sizes for split, sizes in {"train": [3, 6, 6], "test": [3, 6, 6]}.items()},
        **{
            f"rstp {split}": sizes
            for split, sizes in {"train": [3, 6, 12], "val": [1, 2, 4], "test": [2, 4, 8]}.items()
        },
    },
    "SDA": {"train": [14, 14, 14, 1]},
    "SynCPR": {"train": [4, 2, 8]},
    "ITCPR": {
        "query": [2, 2],
        "gallery": [3, 3],
        "query-target pairs": [2, 2],
        "query Celeb-reID": [1, 1],
        "query LAST": [1, 1],
    },
    "ChatPedes": {"train": [1, 1, 2, 3], "test": [1, 1, 2, 3]},
    "MALS": {"train": [1, 1]},
}


def check(root: Path, name: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON report."""
    report = root / "report.json"
    status = data_main(["check", "--dataset", name, "--root_dir", str(root), "--json", str(report), *flags])
    return status, json.loads(report.read_text(encoding="utf-8"))


def images_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.png") if not path.is_symlink())


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("images", ["none", "exist", "decode"])
def test_a_sound_tree_is_usable_and_counted(tmp_path: Path, capsys, name: str, images: str) -> None:
    MAKERS[name](tmp_path)
    status, report = check(tmp_path, name, "--images", images, "--workers", "2")
    assert (status, report["usable"], report["problems"]) == (0, True, [])
    assert {row["subset"]: list(row["found"].values()) for row in report["sizes"]} == SIZES[name]
    assert report["images"]["checked"] == (0 if images == "none" else len(images_of(tmp_path)))
    output = capsys.readouterr().out
    assert output.rstrip().endswith("\nusable")
    published = [row for row in report["sizes"] if row["published"] and set(row["published"].values()) != {0}]
    assert all(row["verdict"] == "DIFFERS" for row in published) and ("DIFFERS" in output) == bool(published)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_missing_corrupt_and_truncated_images_are_listed(tmp_path: Path, capsys, name: str) -> None:
    MAKERS[name](tmp_path)
    paths = images_of(tmp_path)
    if len(paths) == 1:
        paths[0].unlink()
        status, report = check(tmp_path, name)
        assert (status, report["images"]["missing"]["count"]) == (1, 1)
        return
    missing, *rest = paths
    missing.unlink()
    corrupt = rest[0]
    corrupt.write_bytes(b"quota exceeded")
    cut = rest[1] if len(rest) > 1 else None
    if cut:
        cut.write_bytes(cut.read_bytes()[:-200])
    status, report = check(tmp_path, name, "--images", "decode")
    found = report["images"]
    assert (status, report["usable"]) == (1, False)
    assert [Path(path).resolve() for path in found["missing"]["first"]] == [missing]
    assert [Path(path).resolve() for path in found["corrupt"]["first"]] == [corrupt]
    assert [Path(path).resolve() for path in found["truncated"]["first"]] == ([cut] if cut else [])
    assert len(report["problems"]) == 2  # a truncated image can be read
    output = capsys.readouterr().out
    assert missing.name in output and corrupt.name in output and output.rstrip().endswith("\nnot usable")
    status, report = check(tmp_path, name, "--images", "exist")
    assert (status, report["images"]["corrupt"]["count"], report["images"]["missing"]["count"]) == (1, 0, 1)
    assert check(tmp_path, name, "--images", "none")[0] == 0


def test_only_the_first_ten_images_are_listed(tmp_path: Path, capsys) -> None:
    make_raw(tmp_path, "CUHK-PEDES")
    for path in images_of(tmp_path):
        path.unlink()
    status, report = check(tmp_path, "CUHK-PEDES")
    assert (status, report["images"]["missing"]["count"], len(report["images"]["missing"]["first"])) == (1, 12, 10)
    assert capsys.readouterr().out.count("does not exist") == 10


def test_a_link_to_a_file_elsewhere_is_refused_a_linked_folder_is_not(tmp_path: Path) -> None:
    make_raw(tmp_path, "RSTPReid")
    folder = tmp_path / "RSTPReid" / "imgs" / "cam_0"
    shutil.move(folder, tmp_path / "disk2")
    folder.symlink_to(tmp_path / "disk2", target_is_directory=True)
    assert check(tmp_path, "RSTPReid")[0] == 0
    secret = Path(draw(tmp_path / "elsewhere" / "secret.png"))
    image = tmp_path / "RSTPReid" / "imgs" / "cam_1" / "0.png"
    image.unlink()
    image.symlink_to(secret)
    status, report = check(tmp_path, "RSTPReid")
    assert (status, list(report["images"]["outside"]["first"].values())) == (1, [f"links to {secret.resolve()}"])


@pytest.mark.parametrize("name", RAW_NAMES)
def test_ids_shared_between_splits_make_raw_data_unusable(tmp_path: Path, name: str) -> None:
    make_raw(tmp_path, name)
    path = Path(DATASETS[name](tmp_path, verbose=False).anno_path)
    records = json.loads(path.read_text(encoding="utf-8"))
    train = next(record for record in records if record["split"] == "train")
    test = next(record for record in records if record["split"] == "test")
    test["id"] = str(train["id"])
    write(path, records)
    status, report = check(tmp_path, name)
    assert status == 1
    assert f"1 person ids are in train and in test (for example {train['id']})" in report["problems"][0]


def test_ids_shared_between_splits_make_processed_and_dialogue_data_unusable(tmp_path: Path) -> None:
    make_finetune(tmp_path)
    shutil.copy(tmp_path / "data/finetune/cuhk_val.json", tmp_path / "data/finetune/cuhk_test.json")
    status, report = check(tmp_path, "finetune")
    assert status == 1 and "1 person ids are in val and in test" in report["problems"][0]
    make_chatpedes(tmp_path)
    shutil.copy(tmp_path / "ChatPedes/train_reid.json", tmp_path / "ChatPedes/test_reid.json")
    status, report = check(tmp_path, "ChatPedes")
    assert status == 1 and "1 person ids are in train and in test" in report["problems"][0]


@pytest.mark.parametrize(
    ("name", "file", "counted"),
    [
        ("SDA", f"data/sda/{SDA_SHARDS[3]}", f"1 of 14 annotation files are missing in .*: {SDA_SHARDS[3]}"),
        ("MALS", f"MALS/gene_attrs/{MALS_SHARDS[5]}", f"1 of 91 annotation files are missing in .*: {MALS_SHARDS[5]}"),
        (
            "finetune",
            "data/finetune/rstp_val.json",
            "rstp_val.json does not exist, although other files of RSTPReid do",
        ),
    ],
)
def test_an_absent_part_is_a_problem(tmp_path: Path, name: str, file: str, counted: str) -> None:
    MAKERS[name](tmp_path)
    (tmp_path / file).unlink()
    status, report = check(tmp_path, name, "--images", "none")
    assert status == 1
    assert re.search(counted, report["problems"][0])


def test_queries_without_a_target_are_a_problem(tmp_path: Path) -> None:
    make_itcpr(tmp_path)
    gallery = json.loads((tmp_path / "ITCPR/gallery.json").read_text(encoding="utf-8"))
    write(tmp_path / "ITCPR/gallery.json", gallery[1:])
    status, report = check(tmp_path, "ITCPR")
    assert (status, report["problems"]) == (1, ["ITCPR: 1 queries have no gallery image of their instance id."])


@pytest.mark.parametrize("name", ["SynCPR", "ITCPR", "ChatPedes", "MALS"])
def test_the_folder_of_the_data_set_itself_is_accepted(tmp_path: Path, name: str) -> None:
    MAKERS[name](tmp_path)
    assert check(tmp_path / name, name)[0] == 0


def test_chatpedes_images_may_lie_in_imgs00(tmp_path: Path) -> None:
    make_chatpedes(tmp_path)
    (tmp_path / "ChatPedes/imgs").rename(tmp_path / "ChatPedes/imgs00")
    assert check(tmp_path, "ChatPedes")[0] == 0


def test_odd_captions_are_counted(tmp_path: Path) -> None:
    make_raw(tmp_path, "RSTPReid")
    path = tmp_path / "RSTPReid/data_captions.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    records[0]["captions"] = ["same", "same"]
    records[1]["captions"] = ["same", "  "]
    records[2]["captions"] = ["word " * 76, "word " * 75]
    records[3]["captions"] = []
    write(path, records)
    status, report = check(tmp_path, "RSTPReid")
    assert status == 0
    assert report["counts"] == {
        "images without caption": 1,
        "empty captions": 1,
        "duplicate captions": 2,
        "captions longer than 77 CLIP tokens": 1,
    }


def test_long_captions_are_counted_in_clip_tokens() -> None:
    """The start and end token count: 75 one-token words fit, 76 do not; a mark between blanks is a token."""
    texts = ["word " * 75, "word " * 76, "! " * 76, "a " * 30, "人" * 80, "word\n" * 76, ""]
    assert count_long_captions(texts) == 4  # 76 words twice, 76 marks, 80 characters of their own


def test_without_open_clip_tokens_are_not_counted(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    make_chatpedes(tmp_path)
    status, report = check(tmp_path, "ChatPedes")
    assert (status, report["counts"]["captions longer than 77 CLIP tokens"]) == (
        0,
        0,
    )  # too short to need the tokenizer
    records = json.loads((tmp_path / "ChatPedes/test_reid.json").read_text(encoding="utf-8"))
    records[0]["chats"] = [[TURN[0], {"from": "user", "value": "word " * 20}]]
    write(tmp_path / "ChatPedes/test_reid.json", records)
    status, report = check(tmp_path, "ChatPedes")
    assert (status, report["counts"]["captions longer than 77 CLIP tokens"]) == (0, None)
    assert "not counted (install open_clip_torch)" in capsys.readouterr().out


def test_published_sizes_fit_exactly_or_within_their_rounding() -> None:
    assert Size(34_054).fits(34_054) and not Size(34_054).fits(34_055)
    assert Size(1_150_000, 10_000).fits(1_154_999) and not Size(1_150_000, 10_000).fits(1_156_000)
    assert PUBLISHED.keys() == INVENTORIES.keys() == set(ALL_NAMES)
    for name in RAW_NAMES:
        subsets = PUBLISHED[name]
        for column in range(2):
            parts = [size.value for subset in subsets if subset != "all" if (size := subsets[subset][column])]
            assert str(subsets["all"][column]) == f"{sum(parts):,}"


def test_a_tree_of_the_published_size_is_called_ok(tmp_path: Path, monkeypatch) -> None:
    make_raw(tmp_path, "RSTPReid")
    own = {subset: tuple(Size(count) for count in counts) for subset, counts in SIZES["RSTPReid"].items()}
    monkeypatch.setitem(PUBLISHED, "RSTPReid", own)
    assert {row["verdict"] for row in check_dataset("RSTPReid", tmp_path, progress=False)["sizes"]} == {"OK"}
    monkeypatch.setitem(own, "val", (Size(1), Size(3), Size(4)))
    verdicts = {row["subset"]: row["verdict"] for row in check_dataset("RSTPReid", tmp_path, progress=False)["sizes"]}
    assert verdicts == {"train": "OK", "val": "DIFFERS", "test": "OK", "all": "OK"}


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_missing_root_is_one_line_and_status_2(tmp_path: Path, capsys, name: str) -> None:
    status, report = check(tmp_path, name)
    error = capsys.readouterr().err.strip()
    assert status == 2 and error.startswith("error: ") and "\n" not in error and str(tmp_path) in error
    assert report["usable"] is False and error == f"error: {report['problems'][0]}"


@pytest.mark.parametrize("name", RAW_NAMES)
def test_an_empty_data_set_is_not_usable(tmp_path: Path, name: str) -> None:
    make_raw(tmp_path, name)
    write(Path(DATASETS[name](tmp_path, verbose=False).anno_path), [])
    status, report = check(tmp_path, name)
    assert (status, report["problems"]) == (1, [f"{name} in {tmp_path} holds no record."])


@pytest.mark.parametrize(
    "flags",
    [
        ["check", "--dataset", "CUHK", "--root_dir", "."],
        ["check", "--dataset", "CUHK-PEDES"],
        ["check", "--dataset", "CUHK-PEDES", "--root_dir", ".", "--images", "all"],
        ["check", "--dataset", "CUHK-PEDES", "--root_dir", ".", "--workers", "0"],
        ["check", "--dataset", "CUHK-PEDES", "--root_dir", ".", "--workers", "two"],
        ["check", "--data", "CUHK-PEDES", "--root_dir", "."],
        ["convert", "--dataset", "SDA", "--root_dir", ".", "--to", "finetune", "--out", "x"],
        ["convert", "--dataset", "CUHK-PEDES", "--root_dir", ".", "--to", "raw", "--out", "x"],
        ["download"],
        [],
    ],
)
def test_unusable_flags_exit_with_2(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        data_main(flags)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", RAW_NAMES)
def test_converted_files_say_the_same_as_the_raw_tree(tmp_path: Path, capsys, name: str) -> None:
    make_raw(tmp_path, name)
    out = tmp_path / "data" / "finetune"
    flags = ["convert", "--dataset", name, "--root_dir", str(tmp_path), "--to", "finetune", "--out", str(out)]
    assert data_main(flags) == 0
    raw = DATASETS[name](tmp_path, verbose=False)
    prefix = {"CUHK-PEDES": "cuhk", "ICFG-PEDES": "icfg", "RSTPReid": "rstp"}[name]
    splits = ["test", "train"] if name == "ICFG-PEDES" else ["test", "train", "val"]
    assert sorted(path.name for path in out.iterdir()) == [f"{prefix}_{split}.json" for split in splits]
    assert capsys.readouterr().out.split() == [
        str(out / f"{prefix}_{s}.json") for s in sorted(splits, key="train val test".find)
    ]

    train = load_processed_train(out / f"{prefix}_train.json", raw.img_dir)
    assert list(zip(train.image_paths, train.captions)) == [(path, caption) for *_, path, caption in raw.train]
    assert train.n_labels == len(raw.train_id_container)
    for split in splits:
        if split != "train":
            data, wanted = load_processed_eval(out / f"{prefix}_{split}.json", raw.img_dir), getattr(raw, split)
            assert (data.image_paths, data.g_pids) == (wanted["img_paths"], wanted["image_pids"])
            assert (data.captions, data.q_pids) == (wanted["captions"], wanted["caption_pids"])


def test_converted_files_have_one_record_per_line_and_raw_values(tmp_path: Path) -> None:
    records = [
        {"split": "train", "id": "12", "file_path": "cam_a/1.png", "captions": ["Ein Mädchen.", "人"]},
        {"split": "query", "id": 3, "file_path": "cam_a/2.png", "captions": ["b"]},
        {"split": "test", "id": 4, "file_path": "cam_a/3.png", "captions": []},
    ]
    write(tmp_path / "CUHK-PEDES/reid_raw.json", records)
    (tmp_path / "CUHK-PEDES/imgs").mkdir()
    flags = [
        "convert",
        "--dataset",
        "CUHK-PEDES",
        "--root_dir",
        str(tmp_path),
        "--to",
        "finetune",
        "--out",
        str(tmp_path),
    ]
    assert data_main(flags) == 0
    assert (tmp_path / "cuhk_train.json").read_text(encoding="utf-8") == (
        '[\n{"image": "cam_a/1.png", "caption": "Ein Mädchen.", "image_id": 12},\n'
        '{"image": "cam_a/1.png", "caption": "人", "image_id": 12}\n]\n'
    )
    assert json.loads((tmp_path / "cuhk_val.json").read_text(encoding="utf-8")) == [
        {"image": "cam_a/2.png", "caption": ["b"], "image_id": 3}
    ]
    assert json.loads((tmp_path / "cuhk_test.json").read_text(encoding="utf-8")) == [
        {"image": "cam_a/3.png", "caption": [], "image_id": 4}
    ]


def test_validation_images_of_icfg_are_left_out_with_a_warning(tmp_path: Path, caplog) -> None:
    make_raw(tmp_path, "ICFG-PEDES")
    path = tmp_path / "ICFG-PEDES/ICFG-PEDES.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"test"', '"val"', 1), encoding="utf-8")
    flags = [
        "convert",
        "--dataset",
        "ICFG-PEDES",
        "--root_dir",
        str(tmp_path),
        "--to",
        "finetune",
        "--out",
        str(tmp_path),
    ]
    assert data_main(flags) == 0
    assert "1 validation images are left out" in caplog.text
    assert not (tmp_path / "icfg_val.json").exists()


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_images_are_linked_or_copied_where_the_configurations_look(tmp_path: Path, monkeypatch, links: bool) -> None:
    if not links:

        def refuse(self, target, target_is_directory=False):
            raise OSError("links need a privilege")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    make_finetune(tmp_path)
    if links:
        make_finetune(tmp_path)  # finds its links in place
    for place in FINETUNE_IMAGES.values():
        folder = tmp_path / "images" / place
        assert folder.is_symlink() == links
        assert len(list(folder.rglob("*.png"))) == 12
        assert not list(folder.parent.glob(".*"))
    assert check(tmp_path, "finetune", "--images", "decode")[0] == 0


def test_something_else_at_the_place_of_the_link_is_left_alone(tmp_path: Path, capsys) -> None:
    make_raw(tmp_path, "RSTPReid")
    other = tmp_path / "images" / "RSTPReid"
    draw(other / "mine.png")
    flags = [
        "convert",
        "--dataset",
        "RSTPReid",
        "--root_dir",
        str(tmp_path),
        "--to",
        "finetune",
        "--out",
        str(tmp_path),
    ]
    assert data_main([*flags, "--link_images", str(tmp_path / "images")]) == 2
    assert f"error: {other} exists and is not" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["mine.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, capsys, monkeypatch) -> None:
    make_raw(tmp_path, "RSTPReid")
    out = tmp_path / "out"
    write(out / "rstp_train.json", ["old"])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(os, "fsync", full)
    flags = ["convert", "--dataset", "RSTPReid", "--root_dir", str(tmp_path), "--to", "finetune", "--out", str(out)]
    assert data_main(flags) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((out / "rstp_train.json").read_text(encoding="utf-8")) == ["old"]
    assert [path.name for path in out.iterdir()] == ["rstp_train.json"]


def test_a_bad_annotation_stops_the_conversion_before_anything_is_written(tmp_path: Path, capsys) -> None:
    make_raw(tmp_path, "CUHK-PEDES")
    (tmp_path / "CUHK-PEDES/reid_raw.json").write_text("[{]", encoding="utf-8")
    flags = ["convert", "--dataset", "CUHK-PEDES", "--root_dir", str(tmp_path), "--to", "finetune", "--out"]
    assert data_main([*flags, str(tmp_path / "out")]) == 2
    assert "reid_raw.json is not valid JSON: line 1, column 3 in record 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--help"], ["check", "--help"], ["convert", "--help"]])
def test_help_needs_no_heavy_import(flags: list[str]) -> None:
    code = (
        "import sys\n"
        "from tbps_common.cli import data_main\n"
        f"try: data_main({flags!r})\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'open_clip'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: tbps-data" in done.stdout
