"""Batches: collation, the move to the device, and the loaders of training and evaluation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from cmlfa.datasets.annotations import read_annotations
from cmlfa.datasets.items import ImageDataset, ImageTextDataset, ImageTextMLMDataset, TextDataset
from cmlfa.datasets.samplers import DistributedIdentitySampler, RandomIdentitySampler
from cmlfa.datasets.transforms import build_transforms
from cmlfa.options import Options
from tbps_common.datasets.raw import RawDataset
from tbps_common.datasets.table import log_table
from tbps_common.run.batches import ReplacingItems, replaced_items, usable_workers
from tbps_common.run.distributed import Ranks, broadcast_object


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Training items to one batch: ints become int64 `[B]`, tensors are stacked.

    Raises:
        TypeError: an entry is neither (for instance an image without a transform).
    """
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if isinstance(values[0], int):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        elif torch.is_tensor(values[0]):
            batch[name] = torch.stack(values)
        else:
            raise TypeError(f"cannot collate the entry {name!r} of type {type(values[0]).__name__}")
    return batch


def prepare_batch(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a training batch to `device`, with what the model would otherwise have to wait for the device to tell.

    Masked captions that equal the caption ids become the same tensor (one copy, and the model need not compare), and
    the labelled positions are found while they are still on the CPU (`mlm_positions`).
    """
    same = "mlm_ids" in batch and torch.equal(batch["mlm_ids"], batch["caption_ids"])
    if "mlm_labels" in batch:
        batch = {**batch, "mlm_positions": batch["mlm_labels"].flatten().nonzero().flatten()}
    moved = {
        name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if not (same and name == "mlm_ids")
    }
    return {**moved, "mlm_ids": moved["caption_ids"]} if same else moved


def build_dataloader(args: Any, data: RawDataset | None = None) -> tuple[Any, ...]:
    """The loaders for the flags in `args`.

    Evaluation is never shuffled: the features of the released model depend on the composition of each batch.

    Args:
        args: namespace or mapping of flags; absent ones take their defaults.
        data: the annotations, if they were read already.

    Returns:
        With `args.training`: (training, evaluation images, evaluation captions, number of training persons), evaluated
        on the split of `args.val_dataset` in batches of `args.batch_size`. Otherwise: (images, captions, number of
        training persons) of the test split in batches of `args.test_batch_size`.

    Raises:
        DatasetError: the data set cannot be read, or the split to evaluate is empty.
        InputError: flags that do not fit the data.
    """
    options = Options.of(args)
    split = options.validation_split if options.training else "test"
    if data is None:
        data = read_annotations(options, split, training=options.training)
    log_table(data.name, ("subset", "ids", "images", "captions"), data.sizes())
    batch_size = options.batch_size if options.training else options.test_batch_size
    evaluation = _evaluation_loaders(options, getattr(data, split), batch_size)
    num_classes = len(data.train_id_container)
    if not options.training:
        return (*evaluation, num_classes)
    return (_training_loader(options, data.train), *evaluation, num_classes)


def _training_loader(options: Options, pairs: list[tuple[int, int, str, str]]) -> DataLoader:
    transform = build_transforms(options.img_size, aug=options.img_aug, is_train=True)
    if options.MLM:
        clean = options.clean_captions
        dataset = ImageTextMLMDataset(pairs, transform, options.text_length, clean_captions=clean)
    else:
        dataset = ImageTextDataset(pairs, transform, options.text_length)
    sampler, batch_size = _training_sampler(options, dataset)
    replaced = replaced_items(options.bad_images, len(dataset))
    return DataLoader(
        dataset if replaced is None else ReplacingItems(dataset, replaced),
        batch_size=batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=usable_workers(options.num_workers),
        collate_fn=collate,
        pin_memory=_pin_memory(options),
        # Workers live for one epoch: their random state then follows from the main process's, which a checkpoint
        # holds, and an interrupted run can be resumed exactly.
        persistent_workers=False,
    )


def _training_sampler(options: Options, dataset: ImageTextDataset) -> tuple[Sampler[int] | None, int]:
    """The sampler (None: shuffle) and the batch size of this process."""
    ranks = Ranks.from_environment()
    if options.sampler == "random":
        shuffled = DistributedSampler(dataset, shuffle=True, seed=options.seed) if ranks.distributed else None
        return shuffled, options.batch_size
    if not ranks.distributed:
        sampler = RandomIdentitySampler(dataset.dataset, options.batch_size, options.num_instance)
        return sampler, sampler.persons_per_batch * options.num_instance
    seed = broadcast_object(np.random.randint(2**31))
    sampler = DistributedIdentitySampler(
        dataset.dataset, options.batch_size, options.num_instance, ranks.rank, ranks.world_size, int(seed)
    )
    return sampler, sampler.share


def _evaluation_loaders(options: Options, split: dict[str, Any], batch_size: int) -> tuple[DataLoader, DataLoader]:
    transform = build_transforms(options.img_size, aug=False, is_train=False)
    images = ImageDataset(split["image_pids"], split["img_paths"], transform)
    captions = TextDataset(split["caption_pids"], split["captions"], options.text_length)
    loaders = [
        DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=False,
            num_workers=usable_workers(options.num_workers),
            pin_memory=_pin_memory(options),
        )
        for dataset in (images, captions)
    ]
    return loaders[0], loaders[1]


def _pin_memory(options: Options) -> bool:
    """Whether batches are about to be copied to a GPU, which is faster from page-locked memory."""
    return torch.cuda.is_available() and options.device != "cpu"
