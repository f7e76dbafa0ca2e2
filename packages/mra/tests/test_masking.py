"""Masking of captions: the reference cases with their number of draws, and the stated distribution."""

import random
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

from mra.text import TextMaskingGenerator, mlm_batch

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##i", "##j"]
CLS, SEP, MASK = 2, 3, 4
FIRST_PIECE = TOKENS.index("##i")


@pytest.mark.golden("mra", kind="masking")
def test_masking_and_its_draws_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    case = golden(golden_name).case
    for entry in case["cases"]:
        rng = random.Random(entry["seed"])
        generator = TextMaskingGenerator(
            case["vocab"],
            entry["mask_prob"],
            entry["mask_max"],
            entry["skipgram_prb"],
            entry["skipgram_size"],
            entry["mask_whole_word"],
            rng=rng,
        )
        assert generator(entry["ids"]) == (entry["out_ids"], entry["positions"]), entry["seed"]
        assert rng.random() == entry["next_random"]


def test_number_of_positions_and_shares_of_replacements() -> None:
    generator = TextMaskingGenerator(TOKENS, 0.25, 10, rng=random.Random(0))
    ids = [CLS, *[5 + number % 8 for number in range(54)], SEP]
    masked = unchanged = 0
    for _ in range(2000):
        out, positions = generator(ids)
        assert len(positions) == len(set(positions)) == 10  # round(56 * 0.25) = 14, at most 10
        assert all(0 < position < 56 for position in positions)
        assert all(before == after for p, (before, after) in enumerate(zip(ids, out)) if p not in positions)
        masked += sum(out[position] == MASK for position in positions)
        unchanged += sum(out[position] == ids[position] for position in positions)
    # 80 % and one of 15 random tokens; 10 % and one of 15. Four standard errors of 20,000 draws are 0.012.
    assert masked / 20_000 == pytest.approx(0.8 + 0.1 / 15, abs=0.012)
    assert unchanged / 20_000 == pytest.approx(0.1 + 0.1 / 15, abs=0.012)


def test_word_pieces_are_chosen_with_their_word() -> None:
    ids = [CLS, 5, FIRST_PIECE, FIRST_PIECE, 6, 7, 8, SEP]
    generator = TextMaskingGenerator(TOKENS, 0.125, 8, skipgram_prb=0.0, rng=random.Random(1))
    seen = set()
    for _ in range(500):
        # One position is wanted; a word of three pieces is cut back to one of them.
        _, positions = generator(ids)
        assert len(positions) == 1
        seen.add(positions[0])
    assert seen == set(range(1, 8))
    wide = TextMaskingGenerator(TOKENS, 3 / 8, 8, skipgram_prb=0.0, rng=random.Random(2))
    assert any(set(wide(ids)[1]) == {1, 2, 3} for _ in range(200))


def test_caption_without_start_token_and_vocabulary_without_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        TextMaskingGenerator(TOKENS, 0.25, 10)([SEP, 5, 6])
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        TextMaskingGenerator(TOKENS, 0.25, 10)([])
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        TextMaskingGenerator(["[PAD]", "[CLS]"], 0.25, 10)


def test_batch_holds_the_hidden_ids_and_is_filled_up() -> None:
    ids = torch.tensor([[CLS, 5, 6, 7, SEP, 0, 0, 0], [CLS, 8, SEP, 0, 0, 0, 0, 0]])
    masked, positions, hidden = mlm_batch(ids, TextMaskingGenerator(TOKENS, 0.25, 4, rng=random.Random(3)), 4)
    assert masked.shape == ids.shape and positions.shape == hidden.shape == (2, 4)
    assert masked.dtype == positions.dtype == hidden.dtype == torch.int64
    assert (hidden[:, 2:] == -100).all() and (positions[:, 2:] == 0).all()
    assert torch.equal(hidden[:, :2], ids.gather(1, positions[:, :2]))
    with pytest.raises(ValueError, match="max_masks"):
        mlm_batch(ids, TextMaskingGenerator(TOKENS, 0.9, 8, rng=random.Random(3)), 4)


def test_generator_reaches_a_loader_process_with_the_global_random_module() -> None:
    copy = ForkingPickler.loads(ForkingPickler.dumps(TextMaskingGenerator(TOKENS, 0.5, 8)))
    ids = [CLS, 5, 6, 7, SEP, 0]
    random.seed(7)
    expected = TextMaskingGenerator(TOKENS, 0.5, 8)(ids)
    random.seed(7)
    assert copy(ids) == expected
