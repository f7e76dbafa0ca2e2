"""Captions, augmentation, token ids: the reference cases, and properties that need none."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mra.text import build_tokenizer, eda, pre_caption, tokenize
from mra.text.augmentation import STOP_WORDS, has_words
from mra.text.wordnet import SynonymTable
from tbps_common.errors import InputError


@pytest.mark.golden("mra", kind="text")
def test_cleaning_matches_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    case = golden(golden_name).case
    for entry in case["pre_caption"]:
        assert pre_caption(entry["caption"], entry["max_words"], entry["icfg_rstp"]) == entry["out"], entry


@pytest.mark.golden("mra", kind="text")
def test_augmentation_and_its_draws_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    case = golden(golden_name).case
    synonyms = SynonymTable(case["synonyms"])
    for entry in case["eda"]:
        rng = random.Random(entry["seed"])
        assert eda(entry["sentence"], num_aug=entry["num_aug"], rng=rng, synonyms=synonyms) == entry["out"], entry
        assert rng.random() == entry["next_random"]
    for entry in case["pre_caption_eda"]:
        rng = random.Random(entry["seed"])
        found = pre_caption(
            entry["caption"], entry["max_words"], entry["icfg_rstp"], is_eda=True, rng=rng, synonyms=synonyms
        )
        assert found == entry["out"], entry


@pytest.mark.golden("mra", kind="text")
def test_token_ids_match_the_reference(golden: Callable[..., Any], golden_name: str) -> None:
    stored = golden(golden_name)
    tokenizer = build_tokenizer(stored.folder)
    for entry in stored.case["tokenize"]:
        ids, atts = tokenize(tokenizer, stored.case["captions"], entry["max_tokens"])
        assert ids.tolist() == entry["ids"]
        assert atts.tolist() == entry["atts"]


def test_augmented_sentences_hold_the_words_of_the_sentence_and_their_synonyms() -> None:
    table = {"man": ["adult male", "guy"], "red": ["crimson"]}
    allowed = {"a", "man", "in", "red", "shoes", "adult", "male", "guy", "crimson"}
    for seed in range(200):
        found = eda("A man in red shoes", num_aug=9, rng=random.Random(seed), synonyms=SynonymTable(table))
        assert len(found) == 10
        assert found[-1] == "a man in red shoes"
        for sentence in found:
            assert sentence and set(sentence.split()) <= allowed


def test_stop_words_are_never_replaced() -> None:
    table = SynonymTable({word: ["wrong"] for word in STOP_WORDS})
    for seed in range(100):
        rng = random.Random(seed)
        # Insertion takes synonyms of any word, so only sentences of the same length show a replacement.
        found = eda("the of a shoe", num_aug=1, rng=rng, synonyms=table)[0]
        assert found.count("wrong") <= 1
        if len(found.split()) == 4:
            assert "wrong" not in found


@pytest.mark.parametrize("text", ["", "123 456", "。。", "' -"])
def test_sentence_without_letters_is_not_augmented_and_draws_nothing(text: str) -> None:
    assert not has_words(text)
    with pytest.raises(ValueError, match="no word"):
        eda(text)
    if text:
        rng = random.Random(5)
        assert pre_caption(text, 10, is_eda=True, rng=rng) == text
        assert rng.random() == random.Random(5).random()


def test_unusable_captions_are_named() -> None:
    with pytest.raises(ValueError, match="empty"):
        pre_caption("", 5)
    with pytest.raises(TypeError, match="string"):
        pre_caption(["a"], 5)  # type: ignore[arg-type]
    assert pre_caption("  spaced   out  ", 5) == "  spaced   out  "
    assert pre_caption("one two three", 2) == "one two"


def vocabulary(
    folder: Path, *words: str, special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
) -> None:
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")


def test_ids_are_padded_to_the_full_length_and_cut_before_the_separator(tmp_path: Path) -> None:
    vocabulary(tmp_path, "a", "man", "##ly")
    tokenizer = build_tokenizer(tmp_path)
    ids, atts = tokenize(tokenizer, ["A manly", "a " * 20], 6)
    assert ids.tolist() == [[2, 5, 6, 7, 3, 0], [2, 5, 5, 5, 5, 3]]
    assert atts.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    none, _ = tokenize(tokenizer, [], 6)
    assert none.shape == (0, 6)


@pytest.mark.parametrize("text", ["漢字 and 😀", "\x00\x07 control", "x" * 10_000, "word " * 10_000, "naïve café"])
def test_any_text_gives_ids_of_the_vocabulary(tmp_path: Path, text: str) -> None:
    vocabulary(tmp_path, *"abcdefghijklmnopqrstuvwxyz", "and")
    ids, atts = tokenize(build_tokenizer(tmp_path), [text], 12)
    row = ids[0].tolist()
    assert row[0] == 2 and row.count(3) == 1 and max(row) < 32
    assert atts[0].tolist() == [int(number != 0) for number in row]


@pytest.mark.parametrize("damage", ["missing", "special", "doubled", "latin-1"])
def test_unusable_vocabulary_is_named(tmp_path: Path, damage: str) -> None:
    if damage == "special":
        vocabulary(tmp_path, "a", special=("[PAD]", "[UNK]", "[SEP]", "[MASK]"))
    elif damage == "doubled":
        vocabulary(tmp_path, "a", "b", "a")
    elif damage == "latin-1":
        (tmp_path / "vocab.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"vocab\.txt"):
        build_tokenizer(tmp_path)
