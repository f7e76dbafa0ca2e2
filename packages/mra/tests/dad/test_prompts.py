"""Prompts, names and seeds: what a picture is made from and where it goes."""

import pytest

from mra.config import load_config
from mra.dad.generate import image_seed, prompts_of
from mra.dad.records import annotation_name, caption_range, image_name, ranges
from mra.model.settings import PACKAGE
from mra.text.wordnet import SynonymTable

SYNONYMS = SynonymTable({"man": ["guy", "gentleman"], "red": ["crimson"], "shirt": ["top"], "walking": ["strolling"]})
CAPTION = "A man in a red shirt is walking, and he carries 2 bags."


def test_twenty_prompts_begin_with_the_caption_itself() -> None:
    prompts = prompts_of(f"  {CAPTION} \n", 20, 42, 7, SYNONYMS)
    assert len(prompts) == 20 and prompts[0] == CAPTION
    assert len(set(prompts)) > 10
    assert all(prompt and prompt == prompt.strip() for prompt in prompts)
    # All four techniques are among them: a synonym, and fewer, more and equally many words.
    words = {len(prompt.split()) for prompt in prompts[1:]}
    assert min(words) < 11 < max(words)
    assert any(word in " ".join(prompts[1:]) for word in ("guy", "gentleman", "crimson", "top", "strolling"))


def test_prompts_depend_on_seed_and_number_alone() -> None:
    first = prompts_of(CAPTION, 20, 42, 7, SYNONYMS)
    prompts_of("Another caption of a woman.", 20, 42, 8, SYNONYMS)
    assert prompts_of(CAPTION, 20, 42, 7, SYNONYMS) == first
    assert prompts_of(CAPTION, 20, 43, 7, SYNONYMS) != first
    assert prompts_of(CAPTION, 20, 42, 8, SYNONYMS) != first


def test_caption_without_letters_is_repeated() -> None:
    assert prompts_of("1234", 3, 42, 0, SYNONYMS) == ["1234"] * 3
    assert prompts_of("", 3, 42, 0, SYNONYMS) == [""] * 3


def test_files_are_those_that_the_released_configuration_reads() -> None:
    config = load_config(PACKAGE / "configs/sda.yaml")
    assert [f"data/sda/{annotation_name(bounds)}" for bounds in ranges(70000)] == config["train_file_regions"]


@pytest.mark.parametrize(
    "index, name",
    [
        (0, "c_0_5000/0_3.jpg"),
        (4999, "c_0_5000/4999_3.jpg"),
        (5000, "c_5000_10000/5000_3.jpg"),
        (63999, "c_60000_64000/63999_3.jpg"),
        (68125, "c_64000_70000/68125_3.jpg"),
        (70000, "c_70000_75000/70000_3.jpg"),
        (79999, "c_75000_80000/79999_3.jpg"),
    ],
)
def test_image_names(index: int, name: str) -> None:
    assert image_name(index, 3) == name


def test_ranges_follow_each_other_without_a_gap() -> None:
    found = ranges(81000)
    assert found[0][0] == 0 and found[-1][1] >= 81000
    assert all(one[1] == other[0] for one, other in zip(found, found[1:]))
    assert all(caption_range(index) in found for index in range(0, 81000, 999))


def test_image_seeds_differ_and_fit_a_generator() -> None:
    seeds = {image_seed("noise", 42, index, variant) for index in range(50) for variant in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed("noise", 1, 23) != image_seed("noise", 12, 3)
