"""The training folder, its items, and what is said about damaged ones."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dp_gen import DiversePersonDataset, check_dataset, collate_fn, load_tokenizer
from dp_gen.cli import train_main
from dp_gen.data import read_references
from dp_gen.data.check import main as check_data_main
from dp_gen.data.folder import TrainingFolder
from dp_gen.data.references import natural_sort
from tbps_common.errors import DatasetError

MakeArgs = Callable[..., argparse.Namespace]


@pytest.fixture
def dataset(training_folder: Path, small_args: MakeArgs) -> Callable[..., DiversePersonDataset]:
    def make(root: Path = training_folder, split: str = "train", **fields: Any) -> DiversePersonDataset:
        args = small_args(**fields)
        return DiversePersonDataset(root, load_tokenizer(args.pretrained_model_hf), args, split)

    return make


def test_items_and_batches(dataset: Callable[..., DiversePersonDataset]) -> None:
    data = dataset()
    assert len(data) == 6 and len(dataset(split="test")) == 1 and len(dataset(split="all")) == 7
    batch = collate_fn([data[index] for index in range(4)])
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        "pix_v": (4, 3, 64, 64),
        "input_ids": (4, 77),
        "img_token_mask": (4, 77),
        "img_token_idx": (4, 3),
        "img_token_idx_mask": (4, 3),
        "attribute_v": (4, 3, 3, 64, 64),
        "attribute_seg_maps": (4, 3, 64, 64),
        "reference_attribute_num": (4,),
        "img_ids": (4,),
        "reference_places": (10,),
        "token_places": (10,),
    }
    assert batch["reference_places"].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    marked = torch.zeros(4 * 77, dtype=torch.bool).index_fill_(0, batch["token_places"], True)
    assert torch.equal(marked.view(4, 77), batch["img_token_mask"])
    assert batch["reference_attribute_num"].tolist() == [2, 3, 3, 2]
    assert batch["img_token_mask"].sum(dim=1).tolist() == [2, 3, 3, 2]
    assert batch["pix_v"].abs().max() <= 1 and batch["attribute_v"].min() >= 0


def test_references_follow_the_caption_and_show_their_segment(dataset: Callable[..., DiversePersonDataset]) -> None:
    data = dataset(seg_map_interpolation="nearest")
    image, info, seg_map, img_id = data.load(1)
    info = {**info, "segments": info["segments"][::-1]}  # order in the file does not matter
    item = data.preprocess(image, info, seg_map, img_id, flip=False, background=torch.zeros_like(image))
    colours = item["attribute_v"].flatten(2).mean(dim=2)  # hair black, coat blue, pants red
    assert colours[1].argmax() == 2 and colours[2].argmax() == 0 and colours[0].max() < 0.2
    assert item["attribute_seg_maps"].sum(dim=(1, 2)).min() > 0
    assert (item["attribute_seg_maps"].sum(dim=0) <= 1).all()


def test_more_segments_than_slots_and_types(dataset: Callable[..., DiversePersonDataset]) -> None:
    random.seed(0)
    assert int(dataset(MAX_REFERENCE_ATTRIBUTE_NUM=2)[1]["reference_attribute_num"]) == 2
    assert int(dataset(reference_attribute_types="hair")[1]["reference_attribute_num"]) == 1
    assert int(dataset(reference_attribute_types="all")[1]["reference_attribute_num"]) == 3


def test_dropping_captions_and_references(dataset: Callable[..., DiversePersonDataset]) -> None:
    no_caption = dataset(uncondition_prob=1.0)[1]
    assert len(no_caption["input_ids"].unique()) == 2 and int(no_caption["reference_attribute_num"]) == 0
    text_only = dataset(text_only_prob=1.0)[1]
    assert int(text_only["reference_attribute_num"]) == 0 and len(text_only["input_ids"].unique()) > 5
    assert int(dataset(attribute_appear_prob=0.0)[1]["reference_attribute_num"]) == 0


def test_the_random_numbers_do_not_depend_on_the_flags(dataset: Callable[..., DiversePersonDataset]) -> None:
    after = []
    for fields in ({}, {"attribute_appear_prob": 0.5}):
        random.seed(1), torch.manual_seed(1)
        dataset(**fields)[1]
        after.append((random.random(), float(torch.rand(()))))
    assert after[0] == after[1]


def test_a_phrase_beyond_the_text_loses_its_reference(dataset: Callable[..., DiversePersonDataset]) -> None:
    data = dataset()
    image, info, seg_map, img_id = data.load(1)
    long = "a person with black hair " + "and a person " * 60 + "red pants"
    segments = [{**info["segments"][0], "end": 24}, {**info["segments"][2], "end": len(long)}]
    item = data.preprocess(image, {"description": long, "segments": segments}, seg_map, img_id)
    assert int(item["reference_attribute_num"]) == 1 and not item["attribute_v"][1:].any()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_other_forms_of_the_folder(suffix: str, tmp_path: Path, helpers: Any) -> None:
    helpers.write_training_folder(tmp_path, 2)
    for name in ("img_ids", "img_ids_train", "img_ids_test"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"{name.replace('img', 'image')}.txt")
    (tmp_path / "image_ids_train.txt").write_text("\ncat\n\n", encoding="utf-8")
    for file in (tmp_path / "00000").glob("000000000.*"):
        file.rename(tmp_path / f"cat{file.suffix}")
    Image.open(tmp_path / "cat.png").save(tmp_path / f"cat{suffix}")
    (tmp_path / "cat.png").unlink()
    info = json.loads((tmp_path / "cat.json").read_text(encoding="utf-8"))
    info["caption"] = info.pop("description")
    info["segments"][0]["coco_label"] = info["segments"][0].pop("label")
    (tmp_path / "cat.json").write_text(json.dumps(info), encoding="utf-8")
    folder = TrainingFolder(tmp_path)
    _, info, _, number = folder.load(0)
    assert folder.ids == ["cat"] and number == 0 and info["description"].startswith("a person")
    assert info["segments"][0]["label"] == "uppercloth"


def damaged(root: Path, name: str) -> None:
    stem = root / "00000" / "000000001"
    info = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    texts: dict[str, str] = {
        "json": "{",
        "list": "[]",
        "caption": json.dumps({"segments": []}),
        "segments": json.dumps({"description": "x", "segments": {}}),
        "bbox": json.dumps({**info, "segments": [{**info["segments"][0], "bbox": [4, 4, 2, 8]}]}),
        "end": json.dumps({**info, "segments": [{**info["segments"][0], "end": "3"}]}),
    }
    if name in texts:
        stem.with_suffix(".json").write_text(texts[name], encoding="utf-8")
    elif name == "npy":
        stem.with_suffix(".npy").write_bytes(stem.with_suffix(".npy").read_bytes()[:100])
    elif name == "pickle":
        np.save(stem.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif name == "float":
        np.save(stem.with_suffix(".npy"), np.zeros((100, 50)))
    elif name == "256":
        np.save(stem.with_suffix(".npy"), np.full((100, 50), 256))
    elif name == "size":
        np.save(stem.with_suffix(".npy"), np.zeros((10, 50), np.uint8))
    elif name == "image":
        stem.with_suffix(".png").write_bytes(b"")


@pytest.mark.parametrize(
    "name",
    ["json", "list", "caption", "segments", "bbox", "end", "npy", "pickle", "float", "256", "size", "image"],
)
def test_damaged_files_are_named(name: str, tmp_path: Path, helpers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    helpers.write_training_folder(tmp_path, 3)
    damaged(tmp_path, name)
    with pytest.raises(DatasetError, match="000000001"):
        TrainingFolder(tmp_path, "all").load(1)
    assert check_data_main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 problems" in out and "000000001" in out and "Traceback" not in out


@pytest.mark.parametrize("entry", ["../../x", "/etc/passwd", ".."])
def test_ids_are_no_paths(entry: str, tmp_path: Path) -> None:
    (tmp_path / "img_ids_train.txt").write_text(f"{entry}\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="is a path"):
        TrainingFolder(tmp_path)


def test_a_sound_folder_passes(training_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_dataset(training_folder)
    assert report.samples == 7 and not report.problems
    assert report.labels == {"hair": 4, "uppercloth": 7, "bottomcloth": 7}
    assert check_data_main([str(training_folder), "--split", "train"]) == 0
    assert "0 problems" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown"):
        TrainingFolder(training_folder, "val")


def test_missing_files_are_told_before_anything_is_loaded(
    tmp_path: Path, helpers: Any, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "dp"
    helpers.write_training_folder(root, 4)
    (root / "00000" / "000000002.npy").unlink()
    assert train_main(train_flags(tmp_path / "out", "--dataset_name", str(root))) == 2
    assert "000000002.npy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    flags = train_flags(tmp_path / "out", "--reference_attribute_types", "hat")
    assert train_main(flags) == 2
    assert "bottomcloth, hair, uppercloth" in capsys.readouterr().err


def test_an_id_that_is_no_int64_counts_by_its_line(tmp_path: Path, helpers: Any) -> None:
    helpers.write_training_folder(tmp_path, 3)
    long = "9" * 19  # decimal, and above 2**63 - 1
    for file in list((tmp_path / "00000").glob("000000001.*")):
        (tmp_path / f"{long}{file.suffix}").write_bytes(file.read_bytes())
    (tmp_path / "img_ids_train.txt").write_text(f"000000000\n{long}\n", encoding="utf-8")
    folder = TrainingFolder(tmp_path, "train")
    assert [int(torch.tensor(folder.load(index)[3])) for index in (0, 1)] == [0, 1]


def test_references_from_a_folder(tmp_path: Path) -> None:
    for name, level in (("10", 200), ("2", 90), ("0", 10)):
        Image.new("RGB", (8, 20), (level, level, level)).save(tmp_path / f"{name}.png")
    tensor, files = read_references(tmp_path, 16)
    assert [Path(file).name for file in files] == ["0.png", "2.png", "10.png"]
    assert tensor.shape == (3, 3, 16, 16) and (tensor[:, 0, 0, 0] * 255).round().tolist() == [10, 90, 200]
    for name in ("1", "0"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "b.jpg")
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert [Path(file).parent.name + Path(file).name for file in read_references(tmp_path, 8)[1]] == [
        "0a.png",
        "1a.png",
    ]
    with pytest.raises(DatasetError, match="no reference images"):
        (tmp_path / "empty").mkdir()
        read_references(tmp_path / "empty", 8)
    assert [path.name for path in natural_sort([Path("b10"), Path("b9"), Path("1")])] == ["1", "b9", "b10"]
