"""Training batches: items with their token ids and masks, made in the loader processes."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mra.data.datasets import FinetuneDataset, PretrainDataset
from mra.model.bert import longest_texts
from mra.text.tokens import TextMaskingGenerator, mlm_batch, tokenize
from tbps_common.datasets import ProcessedTrain
from tbps_common.datasets.sda import SDA
from tbps_common.run.batches import EpochBatches, ReplacedItems, SeededItems
from tbps_common.run.distributed import Ranks
from tbps_common.run.randomness import seed_worker


class Item(NamedTuple):
    """What is read of one sample.

    Attributes:
        values: picture and numbers, as keyword arguments of the model.
        texts: the caption; then, where the task has them, its augmented form and the region's phrase.
        rng: state of Python's generator after the item's draws, with which the caption is masked.
    """

    values: dict[str, Any]
    texts: list[str]
    rng: tuple[Any, ...]


class TrainingItems(Dataset[Item]):
    """Pictures and texts, and their batches as keyword arguments of the model: token ids, masked token ids, labels.

    Args:
        dataset: `PretrainDataset` or `FinetuneDataset`.
        tokenizer: of `build_tokenizer`.
        config: the keys of the text and of the masking; `region` above 0 adds the region's phrase and tokens.
    """

    def __init__(self, dataset: PretrainDataset | FinetuneDataset, tokenizer: Any, config: dict[str, Any]):
        self.dataset, self.tokenizer = dataset, tokenizer
        self.max_tokens, self.max_masks = config["max_tokens"], config["max_masks"]
        self.eda, self.region = bool(config.get("eda")), config.get("region", 0) > 0
        self.masking = TextMaskingGenerator(
            tokenizer,
            config["mask_prob"],
            config["max_masks"],
            config["skipgram_prb"],
            config["skipgram_size"],
            config.get("mask_whole_word", True),
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        image, caption, augmented, box_atts, phrase, label, idx = self.dataset[index]
        texts = [caption, *([augmented] if self.eda else []), *([phrase] if self.region else [])]
        values = {"image": image, "idx": idx, **({"box_atts": box_atts, "label": label} if self.region else {})}
        return Item(values, texts, random.getstate())

    def collate(self, items: list[Item]) -> dict[str, Any]:
        """A batch: all texts tokenised at once; `lengths` are those of its longest ones (`Retrieval.forward`)."""
        batch = default_collate([item.values for item in items])
        tokens = tokenize(self.tokenizer, [text for item in items for text in item.texts], self.max_tokens)
        # [items, texts of an item, tokens], by text.
        ids, atts = ([*numbers.view(len(items), -1, self.max_tokens).transpose(0, 1)] for numbers in tokens)
        states = iter(items)

        def mask(row: Sequence[int]) -> tuple[list[int], list[int]]:
            random.setstate(next(states).rng)
            return self.masking(row)

        before = random.getstate()
        try:
            masked, positions, hidden = mlm_batch(ids[0], mask, self.max_masks)
        finally:
            random.setstate(before)
        batch |= {"text_ids_masked": masked, "masked_pos": positions, "masked_ids": hidden}
        views = {"main": "", **({"eda": "_eda"} if self.eda else {}), **({"region": "_box"} if self.region else {})}
        for suffix, view_ids, view_atts in zip(views.values(), ids, atts):
            batch |= {f"text_ids{suffix}": view_ids.contiguous(), f"text_atts{suffix}": view_atts.contiguous()}
        return {**batch, "lengths": dict(zip(views, longest_texts(atts)))}


def training_dataset(
    config: dict[str, Any], data: SDA | ProcessedTrain | None = None
) -> PretrainDataset | FinetuneDataset:
    """The training set that a configuration names; `data` is its annotation, if that has been read already."""
    if "train_file_regions" in config:
        return PretrainDataset(config, data=data if isinstance(data, SDA) else None)
    return FinetuneDataset(config, data=data if isinstance(data, ProcessedTrain) else None)


def training_loader(
    dataset: PretrainDataset | FinetuneDataset,
    tokenizer: Any,
    config: dict[str, Any],
    *,
    seed: int,
    ranks: Ranks,
    num_workers: int,
    pin_memory: bool,
    replaced: ReplacedItems | None = None,
) -> tuple[DataLoader[Any], EpochBatches]:
    """The training batches of this process, and the sampler that decides where an iteration begins.

    What a batch holds depends on the seed, the epoch and its number alone: not on the workers, nor on a restart.

    Raises:
        InputError: the data set is smaller than one batch of all processes.
    """
    batches = EpochBatches(
        len(dataset), config["batch_size_train"], seed=seed, rank=ranks.rank, world_size=ranks.world_size
    )
    items = TrainingItems(dataset, tokenizer, config)
    loader = DataLoader(
        SeededItems(items, replaced),
        batch_sampler=batches,
        collate_fn=items.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=seed_worker,
        # Of its own: an iterator draws a number, and a resumed run makes one more of them.
        generator=torch.Generator(),
    )
    return loader, batches
