"""Transforms, items, samplers, loaders: stored outputs and draws of the released code, and what must hold for any data."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmlfa.datasets import (
    CUHKPEDES,
    DATASETS,
    DistributedIdentitySampler,
    ImageDataset,
    ImageTextDataset,
    ImageTextMLMDataset,
    RandomIdentitySampler,
    TextDataset,
    build_dataloader,
    build_transforms,
    collate,
    prepare_batch,
)
from cmlfa.datasets.transforms import MEAN, STD
from tbps_common.errors import DatasetError, InputError


@pytest.mark.golden("cmlfa", kind="transforms")
def test_stored_transforms_and_draws(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors = case.tensors()
    for item in case.case["items"]:
        image = Image.open(case.folder / item["image"]).convert("RGB")
        transform = build_transforms(item["img_size"], item["aug"], item["is_train"])
        torch.manual_seed(item["seed"])
        out = transform(image)
        assert torch.rand(1).item() == item["next_rand"]
        assert type(out) is torch.Tensor and out.dtype == torch.float32
        assert (out - tensors[item["out"]]).abs().max() <= case.case["tolerance"]["abs"], item


@pytest.mark.golden("cmlfa", kind="item")
@pytest.mark.parametrize("clean", [False, True], ids=["masked", "clean"])
def test_stored_items(golden: Any, golden_name: str, clean: bool) -> None:
    case = golden(golden_name)
    path = str(case.folder / "image.png")
    pairs = [(pid, i, path, text) for i, (pid, text) in enumerate(zip(case.case["pids"], case.case["captions"]))]
    transform = build_transforms(case.case["img_size"], aug=True, is_train=True)
    dataset = ImageTextMLMDataset(pairs, transform, clean_captions=clean)
    items = []
    for i in range(len(pairs)):
        random.seed(case.case["seed"] + i)
        torch.manual_seed(case.case["seed"] + i)
        items.append(dataset[i])
    batch, expected = collate(items), case.tensors()
    assert (batch.pop("images") - expected["images"]).abs().max() <= case.case["tolerance"]["abs"]
    assert set(batch) == {"pids", "image_ids", "caption_ids", "mlm_ids", "mlm_labels"}
    for name, value in batch.items():
        assert value.dtype == torch.int64
        assert torch.equal(value, expected["clean_ids" if clean and name == "caption_ids" else name]), name


@pytest.mark.golden("cmlfa", kind="sampler")
def test_stored_identity_order(golden: Any, golden_name: str) -> None:
    case = golden(golden_name).case
    source = [(pid, index, "", "") for index, pid in enumerate(case["pids"])]
    for run in case["runs"]:
        sampler = RandomIdentitySampler(source, case["batch_size"], case["num_instances"])
        random.seed(run["seed"])
        np.random.seed(run["seed"])
        assert list(sampler) == run["indices"]
        assert len(sampler) == run["len"]


@pytest.mark.golden("cmlfa", kind="datasets")
def test_stored_annotation_trees(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    root = case.folder / case.case["root"]

    def relative(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    for name, expected in case.case["expected"].items():
        data = DATASETS[name](root=str(root), verbose=False)
        assert [[pid, image, relative(path), text] for pid, image, path, text in data.train] == expected["train"]
        for split in ("val", "test"):
            found = dict(getattr(data, split))
            found["img_paths"] = [relative(path) for path in found["img_paths"]]
            assert found == expected[split]


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 20, 3), dtype=np.uint8)
    path = tmp_path / "person.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_erased_pixels_hold_the_plain_mean(image_path: str) -> None:
    transform = build_transforms((32, 16), aug=True)
    image = Image.new("RGB", (16, 32), (255, 0, 0))
    torch.manual_seed(0)
    erased = [transform(image) for _ in range(20)]
    hit = [out for out in erased if (out == torch.tensor(MEAN).view(3, 1, 1)).all(dim=0).any()]
    assert 4 < len(hit) < 16
    red = (1 - MEAN[0]) / STD[0]
    assert all(out[0].max() == pytest.approx(red, rel=1e-5) for out in erased)


def test_items_without_masking(image_path: str) -> None:
    dataset = ImageTextDataset([(3, 0, image_path, "A man."), (4, 0, image_path, "A coat.")], None, 8)
    assert len(dataset) == 2
    item = dataset[1]
    assert item["pids"] == 4 and isinstance(item["images"], Image.Image) and item["caption_ids"].shape == (8,)
    with pytest.raises(TypeError, match="images"):
        collate([item])


def test_masked_captions_are_the_caption_ids_unless_clean(image_path: str) -> None:
    pairs = [(0, 0, image_path, "A man in a red coat walks.")]
    transform = build_transforms((32, 16), is_train=False)
    released = ImageTextMLMDataset(pairs, transform)[0]
    assert torch.equal(released["caption_ids"], released["mlm_ids"])
    clean = ImageTextMLMDataset(pairs, transform, clean_captions=True)[0]
    assert torch.equal(clean["caption_ids"], ImageTextDataset(pairs)[0]["caption_ids"])
    assert not torch.equal(clean["caption_ids"], clean["mlm_ids"])


def test_evaluation_items(image_path: str) -> None:
    images = ImageDataset([7], [image_path], build_transforms((32, 16), is_train=False))
    pid, image = images[0]
    assert pid == 7 and image.shape == (3, 32, 16) and len(images) == 1
    texts = TextDataset([7, 8], ["A man.", ""], text_length=6)
    pid, ids = texts[1]
    assert pid == 8 and ids.tolist() == [49406, 49407, 0, 0, 0, 0] and ids.dtype == torch.int64


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    dataset = ImageTextDataset([(0, 0, str(path), "A man.")])
    with pytest.raises(DatasetError, match=r"broken\.jpg"):
        dataset[0]


def test_a_batch_prepared_on_the_cpu() -> None:
    labels = torch.tensor([[0, 5, 0], [7, 0, 9]])
    masked = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {"caption_ids": masked.clone(), "mlm_ids": masked, "mlm_labels": labels, "pids": torch.tensor([0, 1])}
    moved = prepare_batch(batch, torch.device("cpu"))
    assert moved["mlm_ids"] is moved["caption_ids"]
    assert moved["mlm_positions"].tolist() == [1, 3, 5]
    other = prepare_batch({**batch, "caption_ids": masked + 1}, torch.device("cpu"))
    assert torch.equal(other["mlm_ids"], masked) and torch.equal(other["caption_ids"], masked + 1)
    plain = prepare_batch({"pids": batch["pids"]}, torch.device("cpu"))
    assert set(plain) == {"pids"}


def identity_source(sizes: list[int]) -> list[tuple[int, int, str, str]]:
    return [(pid, 0, "", "") for pid, size in enumerate(sizes) for _ in range(size)]


def test_identity_batches_hold_whole_groups() -> None:
    source = identity_source([1, 9, 4, 5, 8, 3])
    sampler = RandomIdentitySampler(source, batch_size=9, num_instances=4)
    order = list(sampler)
    assert 0 < len(order) <= len(sampler)
    for start in range(0, len(order), 8):
        pids = [source[index][0] for index in order[start : start + 8]]
        assert len(pids) == 8 and len(set(pids)) == 2 and pids[:4] == [pids[0]] * 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_distributed_identity_shares_are_disjoint_and_of_equal_length(world_size: int) -> None:
    source = identity_source([4, 9, 4, 5, 8, 6, 12, 4])
    samplers = [
        DistributedIdentitySampler(source, 8 * world_size, 4, rank, world_size, seed=5) for rank in range(world_size)
    ]
    orders = [list(sampler) for sampler in samplers]
    assert len({len(order) for order in orders}) == 1 and len(orders[0]) == len(samplers[0]) > 0
    flat = [index for order in orders for index in order]
    assert len(flat) == len(set(flat))
    for order in orders:
        for start in range(0, len(order), 4):
            assert len({source[index][0] for index in order[start : start + 4]}) == 1
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != orders[0]
    samplers[0].set_epoch(0)
    assert list(samplers[0]) == orders[0]


def test_identity_sampler_says_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="--num_instance 4 does not fit"):
        RandomIdentitySampler(identity_source([4, 4]), 3, 4)
    with pytest.raises(InputError, match="needs 4 persons"):
        RandomIdentitySampler(identity_source([4, 4]), 16, 4)


@pytest.fixture
def cuhk(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A CUHK-PEDES tree of 4 training and 2 test persons, and the flags to load it."""
    import json

    folder = tmp_path / "CUHK-PEDES"
    (folder / "imgs").mkdir(parents=True)
    records = []
    for person in range(1, 7):
        for view in range(2):
            name = f"{person}_{view}.png"
            Image.new("RGB", (20, 50), (person * 40, view * 90, 10)).save(folder / "imgs" / name)
            split = "train" if person < 5 else "test"
            captions = [f"Person {person} seen from side {view}.", f"A coat of colour {person}."]
            records.append({"split": split, "captions": captions, "file_path": name, "id": person})
    (folder / "reid_raw.json").write_text(json.dumps(records), encoding="utf-8")

    def make(**flags: Any) -> SimpleNamespace:
        defaults = {
            "dataset_name": "CUHK-PEDES",
            "root_dir": str(tmp_path),
            "img_size": [32, 16],
            "text_length": 12,
            "img_aug": True,
            "MLM": True,
            "sampler": "random",
            "num_instance": 2,
            "batch_size": 6,
            "test_batch_size": 3,
            "num_workers": 0,
            "val_dataset": "test",
            "training": True,
        }
        return SimpleNamespace(**(defaults | flags))

    return make


def test_training_loaders(cuhk: Callable[..., SimpleNamespace]) -> None:
    train, images, captions, num_classes = build_dataloader(cuhk())
    batches = list(train)
    assert num_classes == 4
    assert [len(batch["pids"]) for batch in batches] == [6, 6, 4]
    assert batches[0]["images"].shape == (6, 3, 32, 16) and batches[0]["mlm_ids"].shape == (6, 12)
    assert torch.cat([pids for pids, _ in images]).tolist() == [5, 5, 6, 6]
    assert [len(pids) for pids, _ in captions] == [6, 2]


def test_test_loaders_use_the_test_batch_size(cuhk: Callable[..., SimpleNamespace]) -> None:
    images, captions, num_classes = build_dataloader(cuhk(training=False))
    assert num_classes == 4
    assert [len(pids) for pids, _ in images] == [3, 1]
    assert [tuple(ids.shape) for _, ids in captions] == [(3, 12), (3, 12), (2, 12)]


def test_identity_loader(cuhk: Callable[..., SimpleNamespace]) -> None:
    train, *_ = build_dataloader(cuhk(sampler="identity", MLM=False))
    for batch in train:
        pids = batch["pids"].view(-1, 2)
        assert len(pids) == 3 and (pids[:, 0] == pids[:, 1]).all()
        assert "mlm_ids" not in batch


def test_worker_processes_repeat_themselves_under_a_seed(cuhk: Callable[..., SimpleNamespace]) -> None:
    def epoch() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(5)
        random.seed(5)
        return list(build_dataloader(cuhk(num_workers=2))[0])

    for first, second in zip(epoch(), epoch(), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_split_is_refused(cuhk: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(DatasetError, match="reid_raw.json .* val split"):
        build_dataloader(cuhk(val_dataset="val"))


def test_training_pids_start_at_zero(cuhk: Callable[..., SimpleNamespace]) -> None:
    data = CUHKPEDES(root=cuhk().root_dir, verbose=False)
    assert sorted({pid for pid, *_ in data.train}) == [0, 1, 2, 3]
