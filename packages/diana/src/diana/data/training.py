"""Training items: one image with one text, augmented, tokenised and masked."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from diana.data.annotations import TRAIN_DATASETS, annotation_files, image_folder, read_dialogues
from diana.data.augmentation import build_train_transform, mask_token_ids
from diana.data.text import (
    CAPTION_BUDGETS,
    PROMPT_POOL,
    Chat,
    clean_caption,
    prefix_length,
    render_caption,
    render_dialogue,
)
from diana.tokenizer import LENGTH_MULTIPLE, encode, ordinary_tokens
from tbps_common.datasets import load_mals
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.packed import Packed, PackedNumbers, PackedStrings


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes token ids.

    Attributes:
        max_seq_length: tokens, the system text included.
        max_words: of a caption.
        mask_probability: of `mask_token_ids`.
        enable_random_turn: keep a random number of first rounds ("random round retaining").
        pad_to_max_length: pad every text to `max_seq_length`.
    """

    max_seq_length: int
    max_words: int
    mask_probability: float = 0.0
    enable_random_turn: bool = False
    pad_to_max_length: bool = True


class PackedChats(Packed[Chat]):
    """Dialogues as JSON texts, which loader processes share.

    Args:
        chats: to begin with.
    """

    def __init__(self, chats: Iterable[Chat] = ()) -> None:
        self._texts = PackedStrings()
        for chat in chats:
            self.append(chat)

    def append(self, chat: Chat) -> None:
        self._texts.append(json.dumps(chat, ensure_ascii=False))

    def item(self, place: int) -> Chat:
        return json.loads(self._texts.item(place))

    def __len__(self) -> int:
        return len(self._texts)


class TrainingDataset(Dataset[dict[str, Tensor]]):
    """Image-text samples. The random draws of an item come in the order of the released code.

    Python's generator chooses the number of rounds or the prompt; then torch's generator augments the image and masks
    the tokens.

    Args:
        paths: image of every sample.
        labels: identity of every sample.
        texts: a cleaned caption, or a dialogue (list of rounds), of every sample. Millions of samples are given as
            packed sequences, which loader processes share.
        transform: PIL image to `[3, H, W]`.
        tokenizer: see `diana.tokenizer.load_tokenizer`.
        settings: of the text.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        texts: Sequence[str | Chat],
        transform: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: TextSettings,
    ) -> None:
        self.paths, self.labels, self.texts = paths, labels, texts
        self.transform, self.tokenizer, self.settings = transform, tokenizer, settings
        self.num_images = len(set(paths))
        self.num_ids = len(set(labels))
        self.num_captions = len(texts)
        self._masking: dict[str, Any] = {
            "mask_token_id": tokenizer.mask_token_id,
            "protected_ids": (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
            "vocab_limit": ordinary_tokens(tokenizer),
        }

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def images(self) -> list[str]:
        """Distinct paths, in order of first appearance."""
        return list(dict.fromkeys(self.paths))

    @property
    def text_lengths(self) -> list[int]:
        """Characters of every sample's caption or whole dialogue, to batch texts of similar length."""
        return [_characters(text) for text in self.texts]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` `[3, H, W]`, `input_ids` and `attention_mask` `[L]`, `image_ids` `[1]`."""
        settings = self.settings
        text = self._render(self.texts[index])
        pixel_values = self.transform(read_image(self.paths[index]))
        tokens = encode(self.tokenizer, [text], settings.max_seq_length, settings.pad_to_max_length, multiple=1)
        masked = mask_token_ids(tokens["input_ids"], settings.mask_probability, **self._masking)
        return {
            "pixel_values": pixel_values,
            "input_ids": masked[0],
            "attention_mask": tokens["attention_mask"][0],
            "image_ids": torch.tensor([self.labels[index]]),
        }

    def _render(self, text: str | Chat) -> str:
        if isinstance(text, str):
            prompt = random.choice(PROMPT_POOL)
            return render_caption(clean_caption(text, self.settings.max_words), prompt)
        if self.settings.enable_random_turn:
            text = text[: random.randint(1, len(text))]
        return render_dialogue(text)


def build_training_dataset(
    meta: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_name: str,
    split: str = "train",
    image_size: Sequence[int],
    max_seq_length: int,
    mask_probability: float = 0.0,
    enable_random_turn: bool = False,
    pad_to_max_length: bool = True,
    turn_limit: int = -1,
    caption_budget: str = "caption",
) -> TrainingDataset:
    """Read a data set and make its samples.

    Args:
        meta: see `diana.data.load_dataset_config`.
        tokenizer: see `diana.tokenizer.load_tokenizer`.
        dataset_name: `mals` (captions) or `chatpedes` (dialogues).
        split: key prefix of `<split>_annotation`.
        image_size: height and width.
        max_seq_length: tokens of a text, and words of a caption.
        mask_probability: of token masking.
        enable_random_turn: random round retaining.
        pad_to_max_length: pad every text to its limit.
        turn_limit: keep the first n rounds of every dialogue if above 0.
        caption_budget: `caption` counts `max_seq_length` from the end of the system text, which alone would fill most
            of the released 56; `total` counts from the beginning, as the released code does.

    Raises:
        InputError: an unknown name, or a limit that cannot be used.
        DatasetError: a file or record cannot be used.
    """
    if dataset_name not in TRAIN_DATASETS:
        raise InputError(f"--dataset_name must be {' or '.join(TRAIN_DATASETS)}, but it is {dataset_name!r}.")
    if caption_budget not in CAPTION_BUDGETS:
        raise InputError(f"--caption_budget must be {' or '.join(CAPTION_BUDGETS)}, but it is {caption_budget!r}.")
    if max_seq_length < 1:
        raise InputError(f"--max_seq_length must be at least 1, but it is {max_seq_length}.")
    if not 0 <= mask_probability <= 1:
        raise InputError(f"--mask_probability must be from 0 to 1, but it is {mask_probability}.")
    files = annotation_files(meta, split)
    if len(files) > 1:
        files = [file for file in files if file.endswith(".json")]
    budget = max_seq_length
    if dataset_name == "mals":
        records = load_mals(files, image_folder(meta))
        paths, labels = records.image_paths, records.labels
        texts: Sequence[Any] = records.captions
        if caption_budget == "caption":
            budget += prefix_length(tokenizer)
    else:
        paths, labels, texts = _dialogue_samples(files, image_folder(meta), turn_limit)
    if not texts:
        raise DatasetError(f"{', '.join(files)} hold no training sample: get the files again.")
    settings = TextSettings(budget, max_seq_length, mask_probability, enable_random_turn, pad_to_max_length)
    transform = build_train_transform(image_size, meta["mean"], meta["std"])
    return TrainingDataset(paths, labels, texts, transform, tokenizer, settings)


def _dialogue_samples(
    files: list[str], image_root: str, turn_limit: int
) -> tuple[PackedStrings, PackedNumbers, PackedChats]:
    paths, labels, chats = PackedStrings(), PackedNumbers("i"), PackedChats()
    for image, label in read_dialogues(files, image_root):
        if not image.dialogues or not all(image.dialogues):
            raise DatasetError(f"{image.where}: the key 'chats' holds no dialogue to train on; remove the record.")
        for chat in image.dialogues:
            paths.append(image.image_path)
            labels.append(label)
            chats.append(chat[:turn_limit] if turn_limit > 0 else chat)
    return paths, labels, chats


def _characters(text: str | Chat) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(message["value"]) for messages in text for message in messages)


class Collate:
    """Stacks items. Texts are padded, or cut where all of them are padding, to the length of the batch's longest.

    Attention is causal and padding is on the right, so the length does not change the features of real tokens.

    Args:
        pad_token_id: fills shorter texts.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in ("pixel_values", "image_ids")}
        real = max(int(item["attention_mask"].sum()) for item in items)
        available = max(len(item["input_ids"]) for item in items)
        rounded = -(-real // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        # Texts that came unpadded may grow to the multiple; texts padded to a limit never exceed it.
        ragged = len({len(item["input_ids"]) for item in items}) > 1
        length = rounded if ragged else min(rounded, max(available, real))
        batch["input_ids"] = _stretched([item["input_ids"] for item in items], length, self.pad_token_id)
        batch["attention_mask"] = _stretched([item["attention_mask"] for item in items], length, 0)
        return batch


def _stretched(rows: Sequence[Tensor], length: int, fill: int) -> Tensor:
    result = torch.full((len(rows), length), fill, dtype=torch.int64)
    for target, row in zip(result, rows):
        kept = row[:length]
        target[: len(kept)] = kept
    return result
