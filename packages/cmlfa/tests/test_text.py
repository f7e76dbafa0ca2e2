"""Tokenizer and masking: stored ids and draws of the released code, and properties over arbitrary text."""

import random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer as ClipTokenizer

from cmlfa.datasets import SimpleTokenizer, mask_tokens, tokenize
from cmlfa.datasets.tokenizer import END_ID, MASK_ID, START_ID

TOKENIZER = SimpleTokenizer()
CLIP = ClipTokenizer()


@pytest.mark.golden("cmlfa", kind="text")
def test_stored_ids(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    expected = case.tensors()["ids"]
    for row, (caption, length) in zip(expected, case.case["items"], strict=True):
        assert torch.equal(tokenize(caption, TOKENIZER, length), row[:length]), caption
    captions = list(dict.fromkeys(caption for caption, _ in case.case["items"]))
    lengths = [len(TOKENIZER.encode(caption)) + 2 for caption in captions]
    assert lengths == case.case["encoded_length"]
    assert {special: TOKENIZER.encoder[special] for special in case.case["specials"]} == case.case["specials"]
    for caption in case.case["no_crash"]:
        assert TOKENIZER.decode(TOKENIZER.encode(caption)).split() == caption.lower().split()


@pytest.mark.golden("cmlfa", kind="mlm_mask")
def test_stored_masks_and_draws(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors = case.tensors()
    for caption, seed, next_draw in case.case["rows"]:
        ids = tensors[f"ids{caption}"]
        assert torch.equal(tokenize(case.case["captions"][caption], TOKENIZER), ids)
        random.seed(seed)
        mlm_ids, mlm_labels = mask_tokens(ids)
        assert random.random() == next_draw
        assert torch.equal(mlm_ids, tensors[f"mlm_ids{caption}_{seed}"])
        assert torch.equal(mlm_labels, tensors[f"mlm_labels{caption}_{seed}"])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("aBz'.,&;#x3lt -\t\r\n<1", max_size=60))
def test_pieces_are_those_of_clip(text: str) -> None:
    assume(not any(special in CLIP.clean_fn(text) for special in ("<|", "_of_text>", "jekyll")))
    assert TOKENIZER.encode(text) == CLIP.encode(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.integers(3, 77))
def test_a_caption_starts_ends_and_is_padded(text: str, length: int) -> None:
    ids = tokenize(text, TOKENIZER, length)
    assert ids.shape == (length,) and ids.dtype == torch.int64
    assert ids[0] == START_ID
    end = int(ids.argmax())
    if "<|" not in CLIP.clean_fn(text):
        assert ids[end] == END_ID and (ids[end + 1 :] == 0).all() and (ids[:end] != END_ID).all()
    assert int(ids.max()) == END_ID


@pytest.mark.parametrize("text", ["Jekyll", "dr jekyll and mr hyde", "JEKYLL jekylls"])
def test_the_dropped_merge_leaves_two_pieces(text: str) -> None:
    assert MASK_ID not in TOKENIZER.encode(text)
    assert TOKENIZER.decode(TOKENIZER.encode(text)).split() == text.lower().split()


def test_specials_in_a_text_are_tokens() -> None:
    ids = TOKENIZER.encode("a <|mask|> coat <|endoftext|><|StartOfText|>")
    assert ids.count(MASK_ID) == 1 and ids[-2:] == [END_ID, START_ID]
    assert TOKENIZER.decode([MASK_ID]) == "<|mask|>"


def test_long_captions() -> None:
    caption = "red coat " * 60
    ids = tokenize(caption, TOKENIZER)
    assert ids[-1] == END_ID and (ids[1:-1] < MASK_ID).all()
    with pytest.raises(RuntimeError, match="122 tokens"):
        tokenize(caption, TOKENIZER, truncate=False)


def test_ten_thousand_words_are_cut() -> None:
    assert tokenize("walking " * 10_000, TOKENIZER)[-1] == END_ID


def test_vocabulary() -> None:
    assert len(TOKENIZER.encoder) == len(TOKENIZER.decoder) == 49408
    assert sorted(TOKENIZER.decoder) == list(range(49408))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 49407), min_size=1, max_size=75), st.integers(0, 10**6))
def test_masking_keeps_what_it_does_not_choose(words: list[int], seed: int) -> None:
    ids = torch.tensor([START_ID, *words, END_ID])
    before = ids.clone()
    mlm_ids, labels = mask_tokens(ids, random.Random(seed))
    assert torch.equal(ids, before)
    assert torch.equal(mlm_ids[labels == 0], ids[labels == 0])
    chosen = labels > 0
    assert torch.equal(labels[chosen], ids[chosen])
    if ((ids > 0) & (ids < MASK_ID)).any():
        assert chosen.any()


def test_shares_of_masked_random_and_kept_words() -> None:
    rng = random.Random(7)
    ids = torch.tensor([START_ID, *range(1000, 1075), END_ID])
    chosen = masked = kept = words = 0
    for _ in range(2000):
        mlm_ids, labels = mask_tokens(ids, rng)
        picked = labels > 0
        words += 75
        chosen += int(picked.sum())
        masked += int((mlm_ids[picked] == MASK_ID).sum())
        kept += int((mlm_ids[picked] == ids[picked]).sum())
    # 150,000 words: three standard deviations are 0.3, 0.8 and 0.6 percent points.
    assert chosen / words == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.008)
    assert kept / chosen == pytest.approx(0.1, abs=0.006)


def test_an_empty_caption_has_its_end_masked() -> None:
    mlm_ids, labels = mask_tokens(tokenize("", TOKENIZER, 4))
    assert mlm_ids.tolist() == [START_ID, MASK_ID, 0, 0]
    assert labels.tolist() == [0, END_ID, 0, 0]
