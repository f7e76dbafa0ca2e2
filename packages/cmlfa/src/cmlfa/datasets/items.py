"""What one index of a data set gives: training pairs, and the images and captions of evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmlfa.datasets.tokenizer import mask_tokens, shared_tokenizer, tokenize
from tbps_common.images import read_image

Transform = Callable[[Any], Any]


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Training pairs of an image and one of its captions.

    Captions are tokenised where they are loaded: a word that was met before is only looked up.

    Args:
        dataset: tuples (pid, image id, image path, caption).
        transform: from a PIL image to a tensor; None leaves the PIL image.
        text_length: tokens per caption.
        truncate: cut captions that are too long.

    Raises:
        RuntimeError: a caption is too long and `truncate` is false.
    """

    def __init__(
        self,
        dataset: Sequence[tuple[int, int, str, str]],
        transform: Transform | None = None,
        text_length: int = 77,
        truncate: bool = True,
    ):
        self.dataset = dataset
        self.transform = transform
        self.text_length = text_length
        if not truncate:
            _tokenise_all([item[3] for item in dataset], text_length, truncate)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Entries `pids`, `image_ids` (ints), `images` `[3, H, W]` and `caption_ids` int64 `[L]`.

        Raises:
            DatasetError: the image cannot be read.
        """
        pid, image_id, path, caption = self.dataset[index]
        image = read_image(path)
        if self.transform is not None:
            image = self.transform(image)
        caption_ids = tokenize(caption, shared_tokenizer(), self.text_length)
        return {"pids": pid, "image_ids": image_id, "images": image, "caption_ids": caption_ids}


class ImageTextMLMDataset(ImageTextDataset):
    """Training pairs with a masked copy of the caption: `mlm_ids` and `mlm_labels` beside the other entries.

    In the released code the masked ids and the caption ids share their memory, so SDM, ITC and ID are trained on masked
    captions too; the author of its parent IRRA found that undoing this costs accuracy. That is the default here.

    Args:
        dataset: as for `ImageTextDataset`, and so are the three that follow.
        transform: see there.
        text_length: see there.
        truncate: see there.
        clean_captions: leave `caption_ids` unmasked, as the paper describes it.
    """

    def __init__(
        self,
        dataset: Sequence[tuple[int, int, str, str]],
        transform: Transform | None = None,
        text_length: int = 77,
        truncate: bool = True,
        clean_captions: bool = False,
    ):
        super().__init__(dataset, transform, text_length, truncate)
        self.clean_captions = clean_captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The entries of `ImageTextDataset`, `mlm_ids` and `mlm_labels` int64 `[L]` (0: not masked)."""
        item = super().__getitem__(index)
        mlm_ids, mlm_labels = mask_tokens(item["caption_ids"])
        if not self.clean_captions:
            item["caption_ids"] = mlm_ids
        return {**item, "mlm_ids": mlm_ids, "mlm_labels": mlm_labels}


class ImageDataset(Dataset[tuple[int, Any]]):
    """Gallery images in file order: (pid, image).

    Args:
        image_pids: one per image.
        img_paths: of the files.
        transform: applied to the RGB picture.
    """

    def __init__(
        self,
        image_pids: Sequence[int],
        img_paths: Sequence[str],
        transform: Transform | None = None,
    ):
        self.image_pids = image_pids
        self.img_paths = img_paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.image_pids)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        image = read_image(self.img_paths[index])
        return self.image_pids[index], image if self.transform is None else self.transform(image)


class TextDataset(Dataset[tuple[int, Tensor]]):
    """Query captions in file order: (pid, token ids int64 `[L]`), tokenised once at construction."""

    def __init__(
        self, caption_pids: Sequence[int], captions: Sequence[str], text_length: int = 77, truncate: bool = True
    ):
        self.caption_pids = caption_pids
        self.captions = captions
        self.caption_ids = _tokenise_all(captions, text_length, truncate)

    def __len__(self) -> int:
        return len(self.caption_pids)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return self.caption_pids[index], torch.from_numpy(self.caption_ids[index].astype(np.int64))


def _tokenise_all(captions: Sequence[str], text_length: int, truncate: bool) -> np.ndarray:
    ids = np.zeros((len(captions), text_length), dtype=np.int32)
    tokenizer = shared_tokenizer()
    for row, caption in enumerate(captions):
        ids[row] = tokenize(caption, tokenizer, text_length, truncate).numpy()
    return ids
