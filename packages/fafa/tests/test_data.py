"""SynCPR triplets, ITCPR queries and gallery, batches."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fafa.data import GalleryDataset, ITCPRDataset, QueryDataset, SynCPRDataset, collate_fn, train_loader
from fafa.transforms import squarepad_transform_test, squarepad_transform_train
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.run.batches import EpochBatches
from tbps_world.tiny.fafa import write_toy_data


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_data(folder)
    return folder


def test_triplets_are_reference_target_caption_and_group(toy: Path) -> None:
    records = json.loads((toy / "syncpr" / "SynCPR.json").read_text())
    dataset = SynCPRDataset(toy / "syncpr", preprocess=squarepad_transform_test(28))
    assert len(dataset) == len(records) == 16
    for index in (0, 7, 15):
        item, record = dataset[index], records[index]
        assert item is not None
        reference, target, caption, group = item
        transform = squarepad_transform_test(28)
        assert isinstance(reference, torch.Tensor)
        assert isinstance(target, torch.Tensor)
        assert torch.equal(reference, transform(read_image(toy / "syncpr" / record["reference_image_path"])))
        assert torch.equal(target, transform(read_image(toy / "syncpr" / record["target_image_path"])))
        assert (caption, group) == (record["edit_caption"], record["cpr_id"])


def test_reference_draws_before_target(toy: Path) -> None:
    transform = squarepad_transform_train(28)
    dataset = SynCPRDataset(toy / "syncpr", preprocess=transform)
    torch.manual_seed(4)
    item = dataset[3]
    assert item is not None
    torch.manual_seed(4)
    folder = toy / "syncpr" / "test1" / "sub_img"
    for found, side in zip(item[:2], ("left", "right")):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, transform(read_image(folder / f"img_{side}" / f"3-0_{side}.png")))


def test_annotation_may_be_absolute_and_elsewhere(toy: Path, tmp_path: Path) -> None:
    records = json.loads((toy / "syncpr" / "SynCPR.json").read_text())[:3]
    file = tmp_path / "part.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    dataset = SynCPRDataset(toy / "syncpr", file)
    assert len(dataset) == 3
    item = dataset[2]
    assert item is not None
    assert item[0].size == (192, 384)  # without a transform: the picture itself


@pytest.mark.parametrize(
    ("content", "said"), [("[]", "no triplet"), ("[{}]", "reference_image_path"), ("[", "SynCPR.json"), ("{}", "list")]
)
def test_unusable_annotations_are_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "SynCPR.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=said):
        SynCPRDataset(tmp_path)


def test_unknown_split_mode_and_policy_are_refused(toy: Path) -> None:
    for wrong in ({"split": "val"}, {"mode": "classic"}, {"on_error": "ignore"}):
        with pytest.raises(InputError):
            SynCPRDataset(toy / "syncpr", **wrong)  # type: ignore[arg-type]


def test_triplets_that_cannot_be_loaded_are_left_out_of_their_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy_data(tmp_path, triplets=4)
    folder = tmp_path / "syncpr" / "test1" / "sub_img"
    (folder / "img_right" / "1-0_right.png").unlink()
    read_image(folder / "img_left" / "2-0_left.png").resize((100, 200)).save(folder / "img_left" / "2-0_left.png")
    dataset = SynCPRDataset(tmp_path / "syncpr", preprocess=squarepad_transform_train(28))
    with caplog.at_level(logging.WARNING):
        items = [dataset[index] for index in range(4)]
    assert [item is None for item in items] == [False, True, True, False]
    assert "1-0_right.png" in caplog.text
    assert "2-0_left.png: a crop of 384 x 192 pixels" in caplog.text
    references, targets, captions, groups = collate_fn(items)
    assert references.shape == targets.shape == (2, 3, 28, 28)
    assert len(captions) == 2
    assert groups.dtype == torch.int64
    assert groups.tolist() == [0, 1]
    with pytest.raises(DatasetError, match="none of the 2 triplets"):
        collate_fn([None, None])
    strict = SynCPRDataset(tmp_path / "syncpr", preprocess=squarepad_transform_train(28), on_error="stop")
    with pytest.raises(DatasetError, match="--bad-images drop"):
        strict[1]


def test_batches_do_not_depend_on_workers_or_on_where_an_epoch_is_entered(toy: Path) -> None:
    dataset = SynCPRDataset(toy / "syncpr", preprocess=squarepad_transform_train(28))

    def batches(workers: int, first: int) -> list[Any]:
        sampler = EpochBatches(len(dataset), 4, seed=3)
        sampler.set_position(1, first)
        return list(train_loader(dataset, sampler, workers, torch.device("cpu")))

    whole = batches(0, 0)
    assert len(whole) == 4
    for found, expected in [*zip(batches(1, 0), whole), *zip(batches(0, 2), whole[2:])]:
        assert all(torch.equal(found[place], expected[place]) for place in (0, 1, 3))
        assert list(found[2]) == list(expected[2])
    state = torch.get_rng_state()
    batches(0, 0)
    assert torch.equal(state, torch.get_rng_state())  # loading leaves the numbers of drop-out alone


@pytest.mark.parametrize("nested", [False, True])
def test_both_layouts_of_itcpr_are_read(nested: bool, tmp_path: Path) -> None:
    write_toy_data(tmp_path)
    root = tmp_path / "itcpr"
    if nested:
        (tmp_path / "itcpr").rename(tmp_path / "datasets")
        root = tmp_path
    data = ITCPRDataset(root)
    assert set(data.query) == {"person_ids", "img_paths", "instance_ids", "captions"}
    assert set(data.gallery) == {"person_ids", "img_paths", "instance_ids"}
    assert data.query["instance_ids"] == [1, 2, 3, 4]
    assert data.gallery["instance_ids"] == [1, 2, 3, 4, -1]
    assert all(Path(path).is_file() for path in data.query["img_paths"] + data.gallery["img_paths"])


def test_queries_and_gallery_items(tmp_path: Path) -> None:
    write_toy_data(tmp_path)
    data = ITCPRDataset(tmp_path / "itcpr", verbose=False)
    transform = squarepad_transform_test(28)
    query = QueryDataset(data.query["instance_ids"], data.query["img_paths"], data.query["captions"], transform)
    gallery = GalleryDataset(data.gallery["instance_ids"], data.gallery["img_paths"], transform)
    assert (len(query), len(gallery)) == (4, 5)
    instance, image, caption = query[2]
    assert (instance, caption) == (3, data.query["captions"][2])
    assert torch.equal(image, transform(read_image(data.query["img_paths"][2])))
    assert gallery[4][0] == -1
    Path(data.gallery["img_paths"][0]).write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot be read"):
        gallery[0]


@pytest.mark.parametrize("gone", ["itcpr", "query.json", "gallery.json"])
def test_missing_parts_of_itcpr_are_named(gone: str, tmp_path: Path) -> None:
    write_toy_data(tmp_path)
    path = tmp_path / "itcpr" if gone == "itcpr" else tmp_path / "itcpr" / gone
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=gone) as caught:  # as the released code; and one of ours
        ITCPRDataset(tmp_path / "itcpr")
    assert isinstance(caught.value, DatasetError)
