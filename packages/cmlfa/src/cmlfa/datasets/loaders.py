"""Batches: collation, the move to the device, and the loaders of training and evaluation."""

from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from cmlfa.datasets.items import ImageDataset, ImageTextDataset, ImageTextMLMDataset, TextDataset
from cmlfa.datasets.samplers import DistributedIdentitySampler, RandomIdentitySampler
from cmlfa.datasets.transforms import build_transforms
from tbps_common.datasets import DATASETS
from tbps_common.errors import DatasetError, InputError
from tbps_common.run.batches import ReplacingItems, replaced_items


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


def build_dataloader(args: Any) -> tuple[Any, ...]:
    """The loaders for the flags in `args`.

    Evaluation is never shuffled: the features of the released model depend on the composition of each batch.

    Returns:
        With `args.training`: (training, evaluation images, evaluation captions, number of training persons), evaluated
        on the split of `args.val_dataset` in batches of `args.batch_size`. Otherwise: (images, captions, number of
        training persons) of the test split in batches of `args.test_batch_size`.

    Raises:
        DatasetError: the data set cannot be read, or the split to evaluate is empty.
        InputError: flags that do not fit the data.
    """
    if args.dataset_name not in DATASETS:
        raise InputError(f"--dataset_name must be one of {', '.join(DATASETS)}, but it is {args.dataset_name!r}.")
    data = DATASETS[args.dataset_name](root=args.root_dir)
    num_classes = len(data.train_id_container)
    if not args.training:
        return (*_evaluation_loaders(args, data.test, "test", args.test_batch_size), num_classes)
    if not data.train:
        raise DatasetError(f"{data.anno_path} has no captions in its training split, so there is nothing to train on.")
    split = "val" if args.val_dataset == "val" else "test"
    evaluation = _evaluation_loaders(args, getattr(data, split), split, args.batch_size)
    return (_training_loader(args, data.train), *evaluation, num_classes)


def _training_loader(args: Any, pairs: list[tuple[int, int, str, str]]) -> DataLoader:
    transform = build_transforms(args.img_size, aug=args.img_aug, is_train=True)
    if args.MLM:
        clean = getattr(args, "clean_captions", False)
        dataset = ImageTextMLMDataset(pairs, transform, args.text_length, clean_captions=clean)
    else:
        dataset = ImageTextDataset(pairs, transform, args.text_length)
    sampler, batch_size = _training_sampler(args, dataset)
    replaced = replaced_items(getattr(args, "bad_images", "stop"), len(dataset))
    return DataLoader(
        dataset if replaced is None else ReplacingItems(dataset, replaced),
        batch_size=batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=_pin_memory(args),
        # Workers live for one epoch: their random state then follows from the main process's, which a checkpoint
        # holds, and an interrupted run can be resumed exactly.
        persistent_workers=False,
    )


def _training_sampler(args: Any, dataset: ImageTextDataset) -> tuple[Sampler[int] | None, int]:
    """The sampler (None: shuffle) and the batch size of this process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if args.sampler == "random":
        seed = getattr(args, "seed", 1)
        return (DistributedSampler(dataset, shuffle=True, seed=seed) if distributed else None), args.batch_size
    if args.sampler != "identity":
        raise InputError(f"--sampler must be random or identity, but it is {args.sampler!r}.")
    if not distributed:
        sampler = RandomIdentitySampler(dataset.dataset, args.batch_size, args.num_instance)
        return sampler, sampler.persons_per_batch * args.num_instance
    seed = torch.tensor([np.random.randint(2**31)])
    if torch.distributed.get_backend() == "nccl":
        seed = seed.cuda()
    torch.distributed.broadcast(seed, src=0)
    sampler = DistributedIdentitySampler(
        dataset.dataset, args.batch_size, args.num_instance, rank, world_size, int(seed.item())
    )
    return sampler, sampler.share


def _pin_memory(args: Any) -> bool:
    """Whether batches are about to be copied to a GPU, which is faster from page-locked memory."""
    return torch.cuda.is_available() and getattr(args, "device", "auto") != "cpu"


def _evaluation_loaders(args: Any, split: dict[str, Any], name: str, batch_size: int) -> tuple[DataLoader, DataLoader]:
    if not split["image_pids"] or not split["caption_pids"]:
        raise DatasetError(
            f"The {name} split of {args.dataset_name} under {args.root_dir} has {len(split['image_pids'])} images and "
            f"{len(split['caption_pids'])} captions, so nothing can be evaluated: "
            "choose the other split with --val_dataset, or complete the annotations."
        )
    images = ImageDataset(
        split["image_pids"], split["img_paths"], build_transforms(args.img_size, aug=False, is_train=False)
    )
    captions = TextDataset(split["caption_pids"], split["captions"], args.text_length)
    loaders = [
        DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=False,
            num_workers=args.num_workers,
            pin_memory=_pin_memory(args),
        )
        for dataset in (images, captions)
    ]
    return loaders[0], loaders[1]
