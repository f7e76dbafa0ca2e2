"""The items of the fine-tuning: a picture, its caption, and all random numbers that a training step needs for them."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tbps_common.datasets import ProcessedTrain
from tbps_common.images import read_image


class Pairs(Dataset[dict[str, Tensor]]):
    """Image-caption pairs for a diffusion model.

    Noise and time step are drawn with the item, from the seed that `tbps_common.run.batches.SeededItems` gives it, so that
    they do not depend on batch size, processes or an interruption.

    Args:
        data: the training pairs.
        tokenizer: of the diffusion model.
        size: height and width to which pictures are resized.
        latent: shape of a latent picture, `(channels, height, width)`.
        timesteps: length of the noise schedule.
        empty_prompts: share of the captions that are replaced by the empty one.
    """

    def __init__(
        self,
        data: ProcessedTrain,
        tokenizer: Any,
        size: tuple[int, int],
        latent: tuple[int, int, int],
        timesteps: int,
        empty_prompts: float = 0.0,
    ):
        self.data, self.tokenizer, self.size = data, tokenizer, size
        self.latent, self.timesteps, self.empty_prompts = latent, timesteps, empty_prompts

    def __len__(self) -> int:
        return len(self.data.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        height, width = self.size
        picture = read_image(self.data.image_paths[index]).resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w) in -1..1
        caption = "" if random.random() < self.empty_prompts else self.data.captions[index]
        ids = self.tokenizer(
            caption,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids[0]
        return {
            "pixels": pixels,
            "ids": ids,  # (tokens,)
            "encoding_noise": torch.randn(self.latent),
            "noise": torch.randn(self.latent),
            "timestep": torch.randint(self.timesteps, ()),
        }
