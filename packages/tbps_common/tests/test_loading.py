"""Batches and augmentations are the same for any number of workers, processes and restarts."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tbps_common.errors import DatasetError, ImageError, InputError
from tbps_common.run.batches import (
    EpochBatches,
    ItemKey,
    ReplacedItems,
    ReplacingItems,
    SeededItems,
    item_seed,
    usable_workers,
)


class Drawing(Dataset[list[float]]):
    """Every item is its index and one number of each generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]


class Damaged(Drawing):
    """Of some items the image cannot be read, which is noticed after a random number has been drawn."""

    def __init__(self, size: int, bad: set[int]) -> None:
        super().__init__(size)
        self.bad = bad

    def __getitem__(self, index: int) -> list[float]:
        random.random()
        if index in self.bad:
            raise ImageError(f"The image {index}.jpg cannot be read")
        return super().__getitem__(index)


def indices(batches: EpochBatches) -> list[list[int]]:
    return [[key.index for key in batch] for batch in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_order_is_the_distributed_samplers(world_size: int, drop_last: bool) -> None:
    for rank in range(world_size):
        batches = EpochBatches(23, 3, seed=5, rank=rank, world_size=world_size, drop_last=drop_last)
        reference = DistributedSampler(range(23), world_size, rank, shuffle=True, seed=5, drop_last=drop_last)
        for epoch in range(3):
            batches.set_position(epoch)
            reference.set_epoch(epoch)
            flat = list(reference)
            expected = [flat[start : start + 3] for start in range(0, len(flat), 3)]
            expected = [batch for batch in expected if len(batch) == 3 or not drop_last]
            assert indices(batches) == expected and len(batches) == len(expected)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_processes_together_see_the_batches_of_one(size: int, batch: int, world: int, seed: int, epoch: int) -> None:
    size += batch * world
    one = EpochBatches(size, batch * world, seed=seed)
    many = [EpochBatches(size, batch, seed=seed, rank=rank, world_size=world) for rank in range(world)]
    for batches in (one, *many):
        batches.set_position(epoch)
    for whole, parts in zip(one, zip(*many, strict=True), strict=True):
        assert sorted(whole) == sorted(key for part in parts for key in part)


def test_a_restart_goes_on_at_the_next_batch() -> None:
    batches = EpochBatches(20, 3, seed=0)
    batches.set_position(4)
    whole = list(batches)
    batches.set_position(4, first_batch=2)
    assert list(batches) == whole[2:] and len(batches) == len(whole) - 2


def test_unshuffled_order_repeats_the_first_items_to_fill_up() -> None:
    parts = [EpochBatches(5, 2, seed=0, rank=rank, world_size=2, shuffle=False, drop_last=False) for rank in (0, 1)]
    assert [indices(part) for part in parts] == [[[0, 2], [4]], [[1, 3], [0]]]


def test_too_little_data_is_one_sentence() -> None:
    with pytest.raises(InputError, match="7 training items do not fill one batch of 8"):
        EpochBatches(7, 4, seed=0, world_size=2)
    with pytest.raises(InputError):
        EpochBatches(0, 4, seed=0, drop_last=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_do_not_depend_on_workers_or_on_what_was_drawn_before(workers: int) -> None:
    batches = EpochBatches(12, 4, seed=3)
    batches.set_position(1)
    expected = [[SeededItems(Drawing(12))[key] for key in batch] for batch in batches]
    random.random(), np.random.rand(), torch.rand(7)
    loader = DataLoader(SeededItems(Drawing(12)), batch_sampler=batches, num_workers=workers, collate_fn=list)
    assert list(loader) == expected
    batches.set_position(2)
    assert list(loader) != expected


def test_persistent_workers_follow_the_epoch() -> None:
    batches = EpochBatches(8, 4, seed=3)
    loader = DataLoader(
        SeededItems(Drawing(8)), batch_sampler=batches, num_workers=1, persistent_workers=True, collate_fn=list
    )
    seen = []
    for epoch in range(2):
        batches.set_position(epoch)
        seen.append(list(loader))
        assert seen[-1] == [[SeededItems(Drawing(8))[key] for key in batch] for batch in batches]
    assert seen[0] != seen[1]


def test_the_main_process_keeps_its_own_numbers() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    SeededItems(Drawing(3))[ItemKey(2, 77)]
    with pytest.raises(IndexError):
        SeededItems([])[ItemKey(0, 1)]
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_item_seeds_are_spread_out() -> None:
    seeds = {item_seed(seed, epoch, index) for seed in range(3) for epoch in range(5) for index in range(400)}
    assert len(seeds) == 6000
    bits = np.array([[seed >> bit & 1 for bit in range(32)] for seed in seeds])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_items_are_replaced_by_the_next_and_counted(workers: int) -> None:
    bad = {1, 2, 11}  # the last one's place is taken by the first
    batches, replaced = EpochBatches(12, 4, seed=3), ReplacedItems(12)
    items = SeededItems(Damaged(12, bad), replaced)
    loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=list)
    place = {1: 3, 2: 3, 11: 0}
    for epoch in range(2):  # in the second one the bad ones are known
        batches.set_position(epoch)
        expected = [
            [SeededItems(Damaged(12, set()))[ItemKey(place.get(key.index, key.index), key.seed)] for key in batch]
            for batch in batches
        ]
        assert list(loader) == expected
        said = replaced.report("{}.jpg".format)
        if epoch:
            assert said is None  # nothing new
        else:
            assert said is not None and said.startswith("3 of 12 ") and said.endswith("1.jpg, 2.jpg, 11.jpg")
    with pytest.raises(ImageError, match=r"1\.jpg"):
        SeededItems(Damaged(12, bad))[ItemKey(1, 0)]


def test_other_faults_are_not_passed_over_and_nothing_readable_ends_the_run() -> None:
    with pytest.raises(IndexError):
        ReplacingItems([], ReplacedItems(1))[0]
    replaced = ReplacedItems(3)
    items = ReplacingItems(Damaged(3, {0, 1, 2}), replaced)
    for _ in range(2):
        with pytest.raises(DatasetError, match="no image of the 3 training items can be read"):
            items[1]
    said = ReplacedItems(9)
    with pytest.raises(DatasetError):
        ReplacingItems(Damaged(9, set(range(9))), said)[0]
    assert str(said.report(str)).endswith("0, 1, 2, 3, 4 and 4 more")


def test_no_more_loader_processes_than_processors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert usable_workers(0) == 0
        assert caplog.text == ""
        assert 1 <= usable_workers(10_000) < 10_000
    assert "instead of 10000" in caplog.text
