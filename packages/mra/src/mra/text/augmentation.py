"""A caption as the model reads it: cleaned, perhaps augmented, cut to a number of words.

The augmentation is EDA (easy data augmentation): synonyms, insertion, swap and deletion of words.

The order of all random draws is fixed: one generator state gives one result. Where the released code iterates over a
hash-ordered set, whose order changes from process to process, this one goes by first appearance.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from mra.text.wordnet import wordnet_synonyms

Synonyms = Callable[[str], Sequence[str]]

# The released list: not to be replaced by synonyms.
STOP_WORDS = frozenset(
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it "
    "its itself they them their theirs themselves what which who whom this that these those am is are was were be been "
    "being have has had having do does did doing a an the and but if or because as until while of at by for with about "
    "against between into through during before after above below to from up down in out on off over under again "
    "further then once here there when where why how all any both each few more most other some such no nor not only "
    "own same so than too very s t can will just don should now".split()
) | {""}

_REMOVED = str.maketrans({"’": None, "'": None, "-": " ", "\t": " ", "\n": " "})
_NOT_A_LETTER = re.compile("[^a-z ]")
_SPACES = re.compile(" +")
_NOT_ALPHANUMERIC = re.compile("[^0-9a-z]+")


def pre_caption(
    caption: str,
    max_words: int,
    icfg_rstp: bool = False,
    is_eda: bool = False,
    rng: Any = random,
    synonyms: Synonyms | None = None,
) -> str:
    """Prepare one caption.

    Args:
        caption: as the annotation file holds it.
        max_words: a caption of more words is cut after this many, joined by single spaces; others keep their spacing.
        icfg_rstp: lower-case, and replace every run of other characters than 0-9 and a-z by one space.
        is_eda: return an augmented caption (`mra.eda`). A caption without letters is left unaugmented, without a draw.
        rng: generator of the augmentation.
        synonyms: see `mra.eda`.

    Raises:
        TypeError: `caption` is no string.
        ValueError: nothing is left of the caption.
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be a string, not {type(caption).__name__}: {caption!r}")
    text = _NOT_ALPHANUMERIC.sub(" ", caption.lower()) if icfg_rstp else caption
    if is_eda and has_words(text):
        text = eda(text, rng=rng, synonyms=synonyms)[0]
    words = text.split()
    if len(words) > max_words:
        text = " ".join(words[:max_words])
    if not text.strip():
        raise ValueError(f"the caption {caption!r} is empty")
    return text


def comes_out_empty(caption: str, icfg_rstp: bool = False) -> bool:
    """Whether `pre_caption` finds nothing left of a caption."""
    return not (_NOT_ALPHANUMERIC.sub(" ", caption.lower()) if icfg_rstp else caption).strip()


def eda(
    sentence: str,
    alpha_sr: float = 0.1,
    alpha_ri: float = 0.1,
    alpha_rs: float = 0.1,
    p_rd: float = 0.1,
    num_aug: int = 1,
    rng: Any = random,
    synonyms: Synonyms | None = None,
) -> list[str]:
    """Augment a sentence by four techniques (Wei and Zou, 2019) and keep `num_aug` of the results.

    Args:
        sentence: any text; only its letters a-z survive, in lower case.
        alpha_sr: share of the words replaced by synonyms.
        alpha_ri: share of the words for which a synonym of some word is inserted.
        alpha_rs: share of the words swapped.
        p_rd: probability with which each word is deleted.
        num_aug: number of augmented sentences.
        rng: generator of all draws, by default Python's global one.
        synonyms: word -> ordered, cleaned synonyms without the word itself; by default WordNet's.

    Returns:
        The augmented sentences, then the cleaned sentence itself.

    Raises:
        ValueError: the sentence holds no letter.
        InputError: WordNet is asked for and its data are absent.
    """
    original = _clean(sentence)
    words = _words(original)
    if not words:
        raise ValueError(f"the sentence {sentence!r} holds no word that could be augmented")
    find = wordnet_synonyms if synonyms is None else synonyms
    per_technique = int(num_aug / 4) + 1
    count = len(words)
    techniques: tuple[Callable[[], list[str]], ...] = (
        lambda: _replace(words, max(1, int(alpha_sr * count)), rng, find),
        lambda: _insert(words, max(1, int(alpha_ri * count)), rng, find),
        lambda: _swap(words, max(1, int(alpha_rs * count)), rng),
        lambda: _delete(words, p_rd, rng),
    )
    augmented = [" ".join(technique()) for technique in techniques for _ in range(per_technique)]
    augmented = [_clean(text) for text in augmented]
    rng.shuffle(augmented)
    return [*augmented[:num_aug], original]


def has_words(sentence: str) -> bool:
    """Whether `eda` finds anything to augment."""
    return bool(_words(_clean(sentence)))


def _clean(sentence: str) -> str:
    text = _NOT_A_LETTER.sub(" ", sentence.translate(_REMOVED).lower())
    return _SPACES.sub(" ", text).removeprefix(" ")


def _words(sentence: str) -> list[str]:
    return [word for word in sentence.split(" ") if word]


def _replace(words: list[str], wanted: int, rng: Any, synonyms: Synonyms) -> list[str]:
    """Replace every occurrence of up to `wanted` different words."""
    replaced = list(words)
    candidates = list(dict.fromkeys(word for word in words if word not in STOP_WORDS))
    rng.shuffle(candidates)
    done = 0
    for candidate in candidates:
        found = list(synonyms(candidate))
        if found:
            synonym = rng.choice(found)
            replaced = [synonym if word == candidate else word for word in replaced]
            done += 1
        if done >= wanted:
            break
    # A synonym may be several words.
    return " ".join(replaced).split(" ")


def _insert(words: list[str], times: int, rng: Any, synonyms: Synonyms) -> list[str]:
    """Insert `times` times the first synonym of some word at some place."""
    extended = list(words)
    for _ in range(times):
        for attempt in range(1, 11):
            found = synonyms(extended[rng.randint(0, len(extended) - 1)])
            if attempt == 10:  # given up, even if this attempt found something (as released)
                break
            if found:
                extended.insert(rng.randint(0, len(extended) - 1), found[0])
                break
    return extended


def _swap(words: list[str], times: int, rng: Any) -> list[str]:
    """Swap two words, `times` times."""
    swapped = list(words)
    last = len(swapped) - 1
    for _ in range(times):
        one = other = rng.randint(0, last)
        attempts = 0
        while other == one:
            other = rng.randint(0, last)
            attempts += 1
            if attempts > 3:
                break
        else:
            swapped[one], swapped[other] = swapped[other], swapped[one]
    return swapped


def _delete(words: list[str], probability: float, rng: Any) -> list[str]:
    """Delete each word with a probability, but never all of them."""
    if len(words) == 1:
        return list(words)
    kept = [word for word in words if rng.uniform(0, 1) > probability]
    return kept or [words[rng.randint(0, len(words) - 1)]]
