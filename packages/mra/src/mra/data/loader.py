"""Training batches: items with their token ids and masks, made in the loader processes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mra.data.datasets import FinetuneDataset, PretrainDataset
from mra.model.bert import longest_texts
from mra.text.tokens import TextMaskingGenerator, mlm_batch, tokenize
from tbps_common.datasets import ProcessedTrain
from tbps_common.datasets.sda import SDA
from tbps_common.run.batches import EpochBatches, ReplacedItems, SeededItems
from tbps_common.run.distributed import Ranks
from tbps_common.run.randomness import seed_worker


class TrainingItems(Dataset[dict[str, Tensor]]):
    """Items as keyword arguments of the model: pictures, token ids, masked token ids, labels.

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

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, caption, augmented, box_atts, phrase, label, idx = self.dataset[index]
        texts = [caption, *([augmented] if self.eda else []), *([phrase] if self.region else [])]
        ids, atts = tokenize(self.tokenizer, texts, self.max_tokens)
        masked, positions, hidden = mlm_batch(ids[:1], self.masking, self.max_masks)
        item = {
            "image": image,
            "text_ids": ids[0],
            "text_atts": atts[0],
            "text_ids_masked": masked[0],
            "masked_pos": positions[0],
            "masked_ids": hidden[0],
            "idx": torch.tensor(idx),
        }
        if self.eda:
            item |= {"text_ids_eda": ids[1], "text_atts_eda": atts[1]}
        if self.region:
            item |= {"text_ids_box": ids[-1], "text_atts_box": atts[-1], "box_atts": box_atts}
            item["label"] = torch.tensor(label)
        return item


def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch: the items' tensors stacked, and `lengths`, those of its longest texts (`Retrieval.forward`)."""
    batch = default_collate(items)
    masks = {"main": "text_atts", "eda": "text_atts_eda", "region": "text_atts_box"}
    present = {view: batch[name] for view, name in masks.items() if name in batch}
    return {**batch, "lengths": dict(zip(present, longest_texts(list(present.values()))))}


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
    loader = DataLoader(
        SeededItems(TrainingItems(dataset, tokenizer, config), replaced),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=seed_worker,
        # Of its own: an iterator draws a number, and a resumed run makes one more of them.
        generator=torch.Generator(),
    )
    return loader, batches
