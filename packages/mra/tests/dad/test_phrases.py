"""Phrases and boxes of a detector's answer: which words of which caption, and where in which picture."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mra.dad import regions
from mra.dad.options import build_parser
from mra.dad.regions import clean_phrase, grounding_text

CAPTIONS = ("A man. Red coat.", "A woman")


class Answers(torch.nn.Module):
    """Two boxes per picture; the first one's words are the last two before the final full stop."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_text_len=256)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.full((len(input_ids), 2, 256), -torch.inf)
        logits[:, :, : input_ids.shape[1]] = -5.0
        for row, length in enumerate(attention_mask.sum(dim=1).tolist()):
            logits[row, 0, length - 4 : length] = 2.0  # words, full stop, [SEP]
            logits[row, 1, 0] = 1.0  # [CLS] only: a box without a phrase
        boxes = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]).expand(len(input_ids), -1, -1)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


@pytest.fixture
def args(tmp_path: Path, flags: Callable[..., list[str]]) -> Namespace:
    (tmp_path / "images").mkdir()
    for name, size in (("0.jpg", (32, 64)), ("1.jpg", (100, 40))):
        Image.new("RGB", size, "red").save(tmp_path / "images" / name)
    return build_parser().parse_args(flags("regions", tmp_path))


def test_phrases_are_the_words_of_a_pictures_own_caption(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForZeroShotObjectDetection, "from_pretrained", lambda *_, **__: Answers())
    batch = [{"image": f"{number}.jpg", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    pictures = [Image.open(Path(args.images, record["image"])) for record in batch]
    found = regions.build(args)(batch, pictures)
    for record, result, phrase in zip(batch, found, ("red coat", "a woman")):
        assert result == {
            **record,
            "boxes": [[0.25, 0.75, 0.5, 0.5]],
            "logits": [0.8808],
            "phrases": [phrase],
            "removed": {"no phrase": 1},
        }


def test_captions_become_what_the_detector_was_trained_on() -> None:
    assert grounding_text(" A Man in a Red coat. ") == "a man in a red coat."
    assert grounding_text("A man. A bag") == "a man. a bag."


def test_marks_of_the_tokenizer_are_no_words() -> None:
    special = {"[CLS]", "[SEP]", "[PAD]"}
    assert clean_phrase("[CLS] a red coat. [SEP] [PAD]", special) == "a red coat"
    assert clean_phrase("##tail", special) == "tail"
    assert clean_phrase(". [SEP]", special) == ""
