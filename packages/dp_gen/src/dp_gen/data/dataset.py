"""Training items: a picture, its caption with image tokens, and its attributes as reference images."""

import argparse
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from dp_gen.data.folder import TrainingFolder
from dp_gen.data.transforms import Transform4TrainWithSegmap, attribute_transforms, cut_attribute
from dp_gen.model.captions import encode_with_image_tokens, get_img_token_idx, insert_image_tokens
from dp_gen.model.controller import matching_places
from dp_gen.options import attribute_types
from tbps_common.errors import DatasetError

Item = dict[str, Tensor]


class DiversePersonDataset(Dataset[Item]):
    """Items of one split of a training folder; N slots, L text positions, R resolution.

    | key | value |
    | --- | --- |
    | `pix_v` | float32 [3, R, R] in [-1, 1] |
    | `input_ids`, `img_token_mask` | int64 and bool [1, L] |
    | `img_token_idx`, `img_token_idx_mask` | int64 and bool [1, N] |
    | `attribute_v` | float32 [N, 3, R, R] in [0, 1] |
    | `attribute_seg_maps` | float32 [N, R, R], 0 or 1 |
    | `reference_attribute_num`, `img_ids` | int64 scalars |

    Args:
        root: of the training folder.
        tokenizer: of `dp_gen.load_tokenizer`.
        args: `resolution`, `MAX_REFERENCE_ATTRIBUTE_NUM`, `reference_attribute_types`, `seg_map_interpolation`,
            `uncondition_prob`, `text_only_prob`, `attribute_appear_prob`.
        split: `train`, `test` or `all`; every split uses the training's transform, as released.

    Raises:
        DatasetError: the folder cannot be used.
        ValueError: the split's name is unknown.
    """

    def __init__(
        self, root: str | os.PathLike[str], tokenizer: CLIPTokenizer, args: argparse.Namespace, split: str = "train"
    ):
        self.folder = TrainingFolder(root, split)
        self.tokenizer = tokenizer
        self.slots = args.MAX_REFERENCE_ATTRIBUTE_NUM
        self.types = attribute_types(args)
        self.train_transforms = Transform4TrainWithSegmap(args)
        self.attribute_transforms = attribute_transforms(args.resolution)
        self.resolution = args.resolution
        self.uncondition_prob, self.text_only_prob = args.uncondition_prob, args.text_only_prob
        self.attribute_appear_prob = args.attribute_appear_prob

    @property
    def img_ids(self) -> list[str]:
        return self.folder.ids

    def image_path(self, index: int) -> str:
        """Path of an item's image."""
        return str(self.folder.image_path(self.folder.ids[index]))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Item:
        return self.preprocess(*self.load(index))

    def load(self, index: int) -> tuple[Tensor, dict[str, Any], Tensor, int]:
        """Image uint8 [3, h, w], description and segments, mask uint8 [h, w], id as a number."""
        return self.folder.load(index)

    def preprocess(
        self,
        image: Tensor,
        info: Mapping[str, Any],
        seg_map: Tensor,
        img_id: int,
        *,
        flip: bool | None = None,
        background: Tensor | None = None,
    ) -> Item:
        """Make an item.

        Args:
            image: uint8 [3, h, w].
            info: `description`, and `segments` with `id`, `label`, `bbox`, `end`.
            seg_map: [h, w].
            img_id: number of the sample.
            flip: None draws.
            background: uint8 [3, h, w] behind the cut-outs; None draws it.

        Raises:
            DatasetError: a segment lies outside the image.
        """
        segments = [s for s in info["segments"] if self.types is None or s.get("label") in self.types]
        pix_v, seg_t = self.train_transforms(image, seg_map, flip)
        description, segments = self._drawn(info["description"], segments)
        segments = sorted(segments, key=lambda segment: segment["end"])
        if background is None:
            background = torch.randint(0, 255, image.shape, dtype=torch.uint8)

        input_ids, img_token_mask = encode_with_image_tokens(self.tokenizer, insert_image_tokens(description, segments))
        idx, idx_mask = get_img_token_idx(img_token_mask, self.slots)
        used = int(idx_mask.sum())
        references = torch.zeros(self.slots, 3, self.resolution, self.resolution)
        seg_maps = torch.zeros(self.slots, self.resolution, self.resolution)
        # A phrase beyond the text's maximum length has lost its token, and loses its reference.
        for slot, segment in enumerate(segments[:used]):
            require_inside(segment["bbox"], image, img_id)
            cut = cut_attribute(image, background, seg_map, segment["id"], segment["bbox"])
            references[slot] = self.attribute_transforms(cut)
            seg_maps[slot] = seg_t == segment["id"]
        return {
            "pix_v": pix_v,
            "input_ids": input_ids,
            "img_token_mask": img_token_mask,
            "img_token_idx": idx,
            "img_token_idx_mask": idx_mask,
            "attribute_v": references,
            "attribute_seg_maps": seg_maps,
            "reference_attribute_num": torch.tensor(used),
            "img_ids": torch.tensor(img_id),
        }

    def _drawn(self, description: str, segments: list[Any]) -> tuple[str, list[Any]]:
        """FastComposer's classifier-free dropping of caption and references (off by default), and N of them at most.

        The same numbers are drawn whatever the probabilities are.
        """
        chance = random.random()
        if chance < self.uncondition_prob:
            description, segments = "", []
        elif chance < self.uncondition_prob + self.text_only_prob:
            segments = []
        else:
            segments = [segment for segment in segments if random.random() < self.attribute_appear_prob]
        if len(segments) > self.slots:
            segments = random.sample(segments, self.slots)
        return description, segments


def require_inside(bbox: Sequence[int], image: Tensor, img_id: int | str) -> None:
    """Check a segment's box against its image, [3, h, w].

    Raises:
        DatasetError: it does not lie inside.
    """
    height, width = image.shape[1:]
    left, top, right, bottom = bbox
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise DatasetError(
            f"sample {img_id}: 'bbox' {list(bbox)} does not lie inside its image of {width} x {height} pixels: correct "
            "it in the sample's JSON file"
        )


def collate_fn(items: Sequence[Item]) -> Item:
    """A batch: texts are joined along their first dimension, everything else is stacked.

    It also holds `reference_places` and `token_places` (`matching_places`), which a GPU would have to be asked for.

    Raises:
        ValueError: an item has not as many references as marked positions.
    """
    joined = ("input_ids", "img_token_mask", "img_token_idx", "img_token_idx_mask")
    batch = {
        key: torch.cat([item[key] for item in items]) if key in joined else torch.stack([item[key] for item in items])
        for key in items[0]
    }
    slots, tokens = matching_places(
        batch["img_token_mask"], batch["reference_attribute_num"], batch["attribute_v"].shape[1]
    )
    return {**batch, "reference_places": slots, "token_places": tokens}
