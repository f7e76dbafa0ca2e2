"""CUHK-PEDES, ICFG-PEDES and RSTPReid: reference tuples, a naive second reading, and what is said when files lack."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbps_common.datasets import CUHKPEDES, DATASETS, ICFGPEDES, DatasetError, RSTPReid
from tbps_common.datasets.check import as_text, check_dataset

ANNOTATION = {"CUHK-PEDES": "reid_raw.json", "ICFG-PEDES": "ICFG-PEDES.json", "RSTPReid": "data_captions.json"}
PATH_KEY = {"CUHK-PEDES": "file_path", "ICFG-PEDES": "file_path", "RSTPReid": "img_path"}


def write_tree(root: Path, name: str, records: list[dict], annotation: str | None = None) -> None:
    (root / name / "imgs").mkdir(parents=True, exist_ok=True)
    (root / name / (annotation or ANNOTATION[name])).write_text(json.dumps(records), encoding="utf-8")


def record(name: str, split: str, pid: int | str, path: str, captions: list[str]) -> dict:
    return {"split": split, "id": pid, PATH_KEY[name]: path, "captions": captions}


def check_reference(case, name: str) -> None:
    root = case.folder / case.case["root"]
    expected = case.case["expected"][name]
    dataset = DATASETS[name](root)

    def absolute(path: str) -> str:
        return os.path.join(root, path)

    assert dataset.train == [(pid, image, absolute(path), text) for pid, image, path, text in expected["train"]]
    assert len(dataset.train_id_container) == expected["num_train_ids"]
    for split in ("test", "val"):
        wanted = dict(expected[split], img_paths=[absolute(path) for path in expected[split]["img_paths"]])
        assert getattr(dataset, split) == wanted
    assert {subset: counts for subset, *counts in dataset.sizes()} == expected["counts"]


@pytest.mark.golden("tbps_common_datasets", kind="datasets")
@pytest.mark.parametrize("name", DATASETS)
def test_reference_tuples(golden, golden_name: str, name: str) -> None:
    check_reference(golden(golden_name), name)


@pytest.mark.golden("cmlfa", kind="datasets")
@pytest.mark.parametrize("name", DATASETS)
def test_reference_tuples_of_cmlfa(golden, golden_name: str, name: str) -> None:
    check_reference(golden(golden_name), name)


image_records = st.tuples(
    st.sampled_from(["train", "test", "val", "query", ""]),
    st.integers(0, 9),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(DATASETS)), images=st.lists(image_records, max_size=12))
def test_any_tree_equals_a_naive_reading(name: str, images: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("tree")
    records = [
        record(name, split, str(pid) if as_text else pid, f"cam/{i}.png", captions)
        for i, (split, pid, captions, as_text) in enumerate(images)
    ]
    write_tree(root, name, records)
    dataset = DATASETS[name](root, verbose=False)

    train_ids = sorted({pid for split, pid, *_ in images if split == "train"})
    offset = 1 if name == "CUHK-PEDES" else 0
    consecutive = [pid - offset for pid in train_ids] == list(range(len(train_ids)))
    naive, image_id = [], 0
    for i, (split, pid, captions, _) in enumerate(images):
        if split == "train":
            label = pid - offset if consecutive else train_ids.index(pid)
            naive += [(label, image_id, f"{root}/{name}/imgs/cam/{i}.png", caption) for caption in captions]
            image_id += 1
    assert dataset.train == naive
    assert dataset.train_id_container == set(range(len(train_ids)))
    for wanted in ("test", "val"):
        chosen = [
            (pid, captions)
            for split, pid, captions, _ in images
            if split == wanted or (wanted == "val" and split not in ("train", "test"))
        ]
        found = getattr(dataset, wanted)
        assert found["image_pids"] == [pid for pid, _ in chosen]
        assert list(zip(found["caption_pids"], found["captions"])) == [(p, c) for p, texts in chosen for c in texts]
        assert getattr(dataset, f"{wanted}_id_container") == {pid for pid, _ in chosen}
    assert len(dataset.train_annos) + len(dataset.test_annos) + len(dataset.val_annos) == len(images)


def test_ids_with_gaps_are_renumbered_in_sorted_order_with_one_warning(tmp_path: Path, caplog) -> None:
    records = [record("CUHK-PEDES", "train", pid, f"{i}.png", ["a", "b"]) for i, pid in enumerate([70, 5, 70, 12])]
    write_tree(tmp_path, "CUHK-PEDES", records)
    dataset = CUHKPEDES(tmp_path, verbose=False)
    assert [pid for pid, *_ in dataset.train] == [2, 2, 0, 0, 2, 2, 1, 1]
    assert dataset.train_id_container == {0, 1, 2}
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "not consecutive" in caplog.text


def test_consecutive_ids_give_no_warning(tmp_path: Path, caplog) -> None:
    write_tree(tmp_path, "ICFG-PEDES", [record("ICFG-PEDES", "train", pid, "a.png", ["x"]) for pid in (1, 0)])
    assert [pid for pid, *_ in ICFGPEDES(tmp_path, verbose=False).train] == [1, 0]
    assert not caplog.records


def test_an_image_without_caption_counts_but_gives_no_tuple(tmp_path: Path) -> None:
    records = [record("RSTPReid", "train", 0, f"{i}.png", captions) for i, captions in enumerate([["a"], [], ["b"]])]
    write_tree(tmp_path, "RSTPReid", records)
    dataset = RSTPReid(tmp_path, verbose=False)
    assert [(image_id, caption) for _, image_id, _, caption in dataset.train] == [(0, "a"), (2, "b")]
    assert dataset.sizes()[0] == ("train", 1, 3, 2)


def test_empty_captions_are_counted_in_one_warning(tmp_path: Path, caplog) -> None:
    write_tree(tmp_path, "RSTPReid", [record("RSTPReid", "test", 3, "a.png", ["", " \t", "text", ""])])
    dataset = RSTPReid(tmp_path, verbose=False)
    assert len(dataset.test["captions"]) == 4
    assert [entry.getMessage().split(": ")[-1] for entry in caplog.records] == ["3 empty captions"]


def test_the_statistics_table(tmp_path: Path, caplog) -> None:
    records = [record("RSTPReid", "train", i // 2, f"{i}.png", ["a", "b"]) for i in range(2000)]
    write_tree(tmp_path, "RSTPReid", records)
    caplog.set_level(logging.INFO, "tbps_common.datasets")
    RSTPReid(tmp_path)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in caplog.text.splitlines() if "|" in line]
    assert cells == [
        ["subset", "ids", "images", "captions"],
        ["train", "1,000", "2,000", "4,000"],
        ["test", "0", "0", "0"],
        ["val", "0", "0", "0"],
    ]


def test_attributes_name_the_places(tmp_path: Path) -> None:
    write_tree(tmp_path, "CUHK-PEDES", [])
    dataset = CUHKPEDES(str(tmp_path), verbose=False)
    assert dataset.dataset_dir == str(tmp_path / "CUHK-PEDES")
    assert dataset.img_dir == str(tmp_path / "CUHK-PEDES" / "imgs")
    assert dataset.anno_path == str(tmp_path / "CUHK-PEDES" / "reid_raw.json")


def test_the_default_root_is_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    write_tree(tmp_path, "CUHK-PEDES", [record("CUHK-PEDES", "train", 1, "cam_a/1.png", ["a"])])
    monkeypatch.chdir(tmp_path)
    assert CUHKPEDES(verbose=False).train == [(0, 0, "CUHK-PEDES/imgs/cam_a/1.png", "a")]


def test_icfg_accepts_both_file_names_and_prefers_the_hyphen(tmp_path: Path) -> None:
    write_tree(tmp_path, "ICFG-PEDES", [record("ICFG-PEDES", "test", 1, "a.png", ["low"])], "ICFG_PEDES.json")
    assert ICFGPEDES(tmp_path, verbose=False).test["captions"] == ["low"]
    write_tree(tmp_path, "ICFG-PEDES", [record("ICFG-PEDES", "test", 1, "a.png", ["high"])], "ICFG-PEDES.json")
    assert ICFGPEDES(tmp_path, verbose=False).test["captions"] == ["high"]


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_missing_is_named_with_the_expected_tree(tmp_path: Path, name: str) -> None:
    tree = f"expected {name}/{ANNOTATION[name]}"
    with pytest.raises(DatasetError, match=f"folder {tmp_path / name} does not exist: {tree}"):
        DATASETS[name](tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match=f"image folder {tmp_path / name / 'imgs'} does not exist: {tree}"):
        DATASETS[name](tmp_path)
    (tmp_path / name / "imgs").mkdir()
    with pytest.raises(DatasetError, match=f"{ANNOTATION[name]}.* does not exist: {tree}.*GitHub") as caught:
        DATASETS[name](tmp_path)
    assert "\n" not in str(caught.value)


def test_the_wrong_annotation_file_is_named_with_the_right_one(tmp_path: Path) -> None:
    write_tree(tmp_path, "CUHK-PEDES", [{"id": 1, "file_path": "a.png", "captions": ["a"]}], "caption_all.json")
    with pytest.raises(
        DatasetError, match=r"reid_raw.json does not exist \(caption_all.json is not the file"
    ) as caught:
        CUHKPEDES(tmp_path)
    assert "on request" in str(caught.value)


def test_the_wrong_annotation_file_under_the_right_name(tmp_path: Path) -> None:
    write_tree(tmp_path, "CUHK-PEDES", [{"id": 1, "file_path": "a.png", "captions": ["a"]}])
    with pytest.raises(DatasetError, match=r"reid_raw.json: record 0 .* the key 'split' is missing"):
        CUHKPEDES(tmp_path)


def test_a_root_one_level_too_deep_is_recognised(tmp_path: Path) -> None:
    write_tree(tmp_path, "CUHK-PEDES", [])
    with pytest.raises(DatasetError, match="give the folder above it as root"):
        CUHKPEDES(tmp_path / "CUHK-PEDES")


def test_importing_the_readers_does_not_import_torch() -> None:
    code = "import sys, tbps_common.datasets; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_looks_at_no_image(tmp_path: Path, monkeypatch) -> None:
    records = [record("CUHK-PEDES", "train", 1 + i, f"cam_a/{i}.png", ["a"]) for i in range(50)]
    write_tree(tmp_path, "CUHK-PEDES", records)
    looked, stat = [], os.stat

    def counting_stat(path, *args, **kwargs):
        looked.append(str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", counting_stat)
    assert len(CUHKPEDES(tmp_path, verbose=False).train) == 50
    assert looked and not [path for path in looked if path.endswith(".png")]


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("split", ["Train", "TRAIN", "train ", "gallery"])
def test_unknown_splits_are_named_and_nothing_to_train_on_is_not_usable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, split: str
) -> None:
    records = [record(name, split, 1, "a.png", ["a man"]), record(name, "test", 2, "b.png", ["a woman"])]
    write_tree(tmp_path, name, records)
    dataset = DATASETS[name](tmp_path)
    assert dataset.unknown_splits == {split: 1} and len(dataset.val["captions"]) == 1
    assert f"1 records have the split {split!r}, which is neither train, test nor val" in caplog.text
    report = check_dataset(name, tmp_path, images="none", progress=False)
    assert not report["usable"] and any("nothing to train on" in problem for problem in report["problems"])
    assert f"records with the split {split!r}, counted as val: 1" in as_text(report)


def test_the_three_known_splits_are_not_remarked_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = ("train", "val", "test")
    write_tree(
        tmp_path,
        "CUHK-PEDES",
        [record("CUHK-PEDES", split, 1 + i, f"{i}.png", ["a man"]) for i, split in enumerate(splits)],
    )
    assert not DATASETS["CUHK-PEDES"](tmp_path).unknown_splits and "split" not in caplog.text
    assert check_dataset("CUHK-PEDES", tmp_path, images="none", progress=False)["usable"]
