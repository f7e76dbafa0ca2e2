"""Items of the three stages, transforms and region boxes: the reference cases, and properties that need none."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from mra.data import (
    FinetuneDataset,
    PretrainDataset,
    RandomErasing,
    RetrievalTestDataset,
    build_transforms,
    region_attention,
)
from mra.data.loader import training_dataset
from mra.data.regions import box_in_pixels, crop_around
from tbps_common.datasets import load_sda
from tbps_common.errors import DatasetError
from tbps_common.run.batches import EpochBatches, SeededItems


def config_of(stored: Any, name: str) -> dict[str, Any]:
    """The stored configuration with paths that do not depend on the working directory."""
    config = dict(stored.case[name])
    for key, value in config.items():
        if key.endswith("_file") or key.startswith(("train_file", "image_root")):
            inside = [str(stored.folder / part) for part in ([value] if isinstance(value, str) else value)]
            config[key] = inside[0] if isinstance(value, str) else inside
    return config


def seen(image: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    return image if entry["image"] == "full" else image[:, ::8, ::8]


@pytest.mark.golden("mra", kind="data")
def test_pretraining_items_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    stored = golden(golden_name)
    expected, rng = stored.tensors("expected.safetensors"), random.Random()
    dataset = PretrainDataset(config_of(stored, "config_sda"), rng=rng)
    for entry in stored.case["sda_items"]:
        rng.seed(entry["seed"])
        torch.manual_seed(entry["seed"])
        image, caption, augmented, atts, phrase, label, idx = dataset[entry["index"]]
        assert rng.random() == entry["next_random"]
        assert (caption, phrase, label, idx) == tuple(entry[key] for key in ("caption", "box_caption", "label", "idx"))
        assert augmented == {}
        assert torch.equal(atts, expected[f"sda_box_atts_{entry['k']}"])
        torch.testing.assert_close(seen(image, entry), expected[f"sda_image_{entry['k']}"], rtol=0, atol=1e-5)


@pytest.mark.golden("mra", kind="data")
def test_finetuning_items_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    stored = golden(golden_name)
    expected, rng = stored.tensors("expected.safetensors"), random.Random()
    dataset = FinetuneDataset(config_of(stored, "config_ft"), rng=rng)
    for entry in stored.case["ft_items"]:
        rng.seed(entry["seed"])
        torch.manual_seed(entry["seed"])
        image, caption, *others, idx = dataset[entry["index"]]
        assert rng.random() == entry["next_random"]
        assert (caption, others, idx) == (entry["caption"], [{}, {}, {}, {}], entry["idx"])
        torch.testing.assert_close(seen(image, entry), expected[f"ft_image_{entry['k']}"], rtol=0, atol=1e-5)


@pytest.mark.golden("mra", kind="data")
def test_gallery_matches_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    stored = golden(golden_name)
    expected, config = stored.tensors("expected.safetensors"), config_of(stored, "config_ft")
    dataset = RetrievalTestDataset(config["test_file"], config)
    for name, value in stored.case["test"].items():
        assert getattr(dataset, name) == value
    for name, value in expected.items():
        kind, _, number = name.rpartition("_")
        if kind in ("test_image", "test_himage"):
            image, mirrored, index = dataset[int(number)]
            assert index == int(number)
            found = image if kind == "test_image" else mirrored
            torch.testing.assert_close(found, value, rtol=0, atol=1e-5)


@pytest.mark.golden("mra", kind="data")
def test_region_tokens_and_erasing_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    case = golden(golden_name).case
    for entry in case["region_attention"]:
        arguments = {key: value for key, value in entry.items() if key != "out"}
        assert region_attention(**arguments).tolist() == entry["out"]
    for entry in case["erasing"]:
        rng = random.Random(entry["seed"])
        erased = RandomErasing(entry["p"], rng=rng)(torch.ones(3, entry["h"], entry["w"]))
        assert rng.random() == entry["next_random"]
        assert erased[0].tolist() == entry["out"]
        assert torch.equal(erased[0], erased[1]) and torch.equal(erased[0], erased[2])


def test_crop_keeps_the_box_and_scales_it_with_the_picture() -> None:
    """A box painted white on black is found where `crop_around` says it is."""
    rng = random.Random(0)
    for _ in range(100):
        width, height = rng.randint(40, 90), rng.randint(40, 120)
        w, h = rng.uniform(0.3, 1), rng.uniform(0.3, 1)
        box = box_in_pixels((rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2), w, h), width, height)
        assert box is not None
        pixels = np.zeros((height, width, 3), np.uint8)
        rows = slice(math.ceil(box.y), math.floor(box.y + box.h))
        pixels[rows, math.ceil(box.x) : math.floor(box.x + box.w)] = 255
        picture, found = crop_around(Image.fromarray(pixels), box, (192, 128), rng)
        assert picture.size == (128, 192)
        white = np.argwhere(np.asarray(picture)[:, :, 0] > 127)
        top, left = white.min(0)
        bottom, right = white.max(0) + 1
        # A painted pixel is cut at both ends, and scaled by at most 192 / 30.
        assert abs(left - found.x) < 7 and abs(right - found.x - found.w) < 7
        assert abs(top - found.y) < 7 and abs(bottom - found.y - found.h) < 7
        assert found.x > -1e-9 and found.y > -1e-9
        assert found.x + found.w < 128 + 1e-9 and found.y + found.h < 192 + 1e-9


def test_every_box_covers_a_token() -> None:
    rng = random.Random(1)
    for _ in range(500):
        x, y = rng.uniform(0, 127.9), rng.uniform(0, 191.9)
        atts = region_attention(x, y, rng.uniform(1e-6, 128 - x), rng.uniform(1e-6, 192 - y), 32, 6, 4)
        assert atts.shape == (25,) and atts.dtype == torch.int64
        assert atts[0] == 1 and (atts == 0).any()
        assert atts[1:].reshape(6, 4)[int(y // 32), int(x // 32)] == 0


def test_erasing_has_the_stated_probability_and_area() -> None:
    erasing = RandomErasing(0.4, mean=(1.0, 2.0, 3.0), rng=random.Random(2))
    image = torch.zeros(3, 64, 32)
    shares = []
    for _ in range(2000):
        erased = erasing(image)
        shares.append(float((erased[0] == 1).float().mean()))
        assert torch.equal(erased[2], 3 * erased[0])
    assert not image.any()
    hit = [share for share in shares if share]
    assert len(hit) / 2000 == pytest.approx(0.4, abs=0.045)  # four standard errors
    assert 0.015 < min(hit) and max(hit) < 0.42


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture of 40 x 60 with records of several kinds."""
    Image.new("RGB", (40, 60), (200, 100, 50)).save(tmp_path / "a.png")
    records = [
        {"boxes": [], "phrases": []},
        {"boxes": [[0.5, 0.5, 0.01, 0.5]], "phrases": ["no width"]},
        {"boxes": [[1.4, 0.5, 0.2, 0.5]], "phrases": ["outside"]},
        {"boxes": [[0.5, 0.5, -0.3, 0.5]], "phrases": ["negative"]},
        {"boxes": [[0.5, 0.5, 3.0, 3.0]], "phrases": ["larger than the picture"]},
    ]
    for number, record in enumerate(records):
        record |= {"image": "a.png", "caption": f"caption {number}", "image_id": number}
        record["logits"] = [0.5] * len(record["boxes"])
    (tmp_path / "sda.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def sda_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "train_file_regions": [str(folder / "sda.json")],
        "image_root": str(folder),
        **{"h": 96, "w": 64, "patch_size": 32, "erasing_p": 0.6, "max_words": 56},
        **changes,
    }


def test_unusable_box_stands_for_the_whole_picture(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = PretrainDataset(sda_config(folder))
    for index in range(4):
        _, caption, _, atts, phrase, label, idx = dataset[index]
        assert phrase == caption == f"caption {index}"
        assert label == idx == index
        assert (atts == 0).any()
    assert dataset.bad_boxes == 3
    assert [record.message.count("such boxes") for record in caplog.records] == [1, 1]
    *_, phrase, label, idx = dataset[4]
    assert (phrase, label, idx) == ("larger than the picture", 5 + 3, 4)


def test_faulty_records_and_pictures_are_named(folder: Path) -> None:
    records = [{"image": "a.png", "caption": "", "image_id": 1}, {"image": "gone.png", "caption": "x", "image_id": 1}]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    config = sda_config(folder, train_file=[str(folder / "train.json")], icfg_rstp=False, eda=False)
    dataset = FinetuneDataset(config)
    with pytest.raises(DatasetError, match=r"empty.*a\.png"):
        dataset[0]
    with pytest.raises(DatasetError, match=r"gone\.png"):
        dataset[1]
    records = [{"image": "a.png", "caption": ["fine", ""], "image_id": 1}]
    (folder / "test.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"empty.*test\.json"):
        RetrievalTestDataset(folder / "test.json", config)


def test_augmented_captions_follow_the_table_of_the_configuration(folder: Path) -> None:
    (folder / "synonyms.json").write_text('{"man": ["guy"]}', encoding="utf-8")
    records = [{"image": "a.png", "caption": "man", "image_id": 7}]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    config = sda_config(folder, train_file=str(folder / "train.json"), eda=True, synonyms=str(folder / "synonyms.json"))
    random.seed(0)
    seen_captions = {FinetuneDataset(config)[0][2] for _ in range(50)}
    assert seen_captions == {"man", "guy", "guy man"}


def test_forked_and_spawned_loaders_give_the_same_items(folder: Path) -> None:
    """Both kinds of data set in one loader: a process takes seconds to spawn."""
    records = [{"image": "a.png", "caption": f"man {number}", "image_id": 7} for number in range(3)]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    config = sda_config(folder, train_file=str(folder / "train.json"))
    data: Any = ConcatDataset([PretrainDataset(config), FinetuneDataset(config)])
    batches = EpochBatches(len(data), 4, seed=3)
    found = {}
    for method in (None, "fork", "spawn"):
        loader = DataLoader(
            SeededItems(data),
            batch_sampler=batches,
            num_workers=0 if method is None else 1,
            collate_fn=list,
            multiprocessing_context=method,
        )
        found[method] = [item for batch in loader for item in batch]
    assert len(found[None]) == 8
    for method in ("fork", "spawn"):
        for item, expected in zip(found[method], found[None], strict=True):
            assert torch.equal(item[0], expected[0]) and item[1:3] == expected[1:3] and item[4:] == expected[4:]


def test_what_the_checks_have_read_is_not_read_again(folder: Path) -> None:
    config = sda_config(folder)
    data = load_sda(config["train_file_regions"], config["image_root"])
    (folder / "sda.json").unlink()
    dataset = training_dataset(config, data)
    assert len(dataset) == 5 and dataset.image_path(4) == str(folder / "a.png")


def test_only_training_transforms_draw(folder: Path) -> None:
    transforms = build_transforms({"h": 96, "w": 64, "erasing_p": 1.0})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    before = random.getstate(), torch.get_rng_state()
    one, other = transforms["test"](picture), transforms["test"](picture)
    assert torch.equal(one, other)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    transforms["box"](picture)
    assert random.getstate() != before[0] and torch.equal(torch.get_rng_state(), before[1])
    transforms["train"](picture)
    assert not torch.equal(torch.get_rng_state(), before[1])
