"""Twenty prompts per caption: the caption, and nineteen augmented forms of it (paper, section on SDA)."""

import random

from mra.text.augmentation import Synonyms, eda, has_words


def prompts_of(caption: str, variants: int, seed: int, index: int, synonyms: Synonyms | None = None) -> list[str]:
    """The prompts of one caption; the first is the caption itself.

    A prompt depends on the caption, the seed and the caption's number, not on other captions. A caption without letters,
    which cannot be augmented, is repeated.

    Args:
        caption: of the training set.
        variants: how many prompts.
        seed: of the augmentation.
        index: number of the caption.
        synonyms: see `mra.eda`.

    Raises:
        InputError: WordNet is asked for and its data are absent.
    """
    caption = " ".join(caption.split())
    if variants == 1 or not has_words(caption):
        return [caption] * variants
    rng = random.Random(f"mra-dad {seed} {index}")
    augmented = eda(caption, num_aug=variants - 1, rng=rng, synonyms=synonyms)[:-1]
    return [caption, *(text.strip() for text in augmented)]
