"""Synonyms: from WordNet through NLTK (imported when first asked), or from a JSON table."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from tbps_common.errors import InputError

_NOT_A_LETTER = re.compile("[^ a-z]")

DOWNLOAD = "python -m nltk.downloader wordnet"


@functools.cache
def wordnet_synonyms(word: str) -> tuple[str, ...]:
    """All lemma names of all synsets of `word`, cleaned, in WordNet's order, without the word itself.

    Raises:
        InputError: WordNet's data are not installed.
    """
    names = (lemma for synset in open_wordnet().synsets(word) for lemma in synset.lemma_names())
    cleaned = (_NOT_A_LETTER.sub("", name.replace("_", " ").replace("-", " ").lower()) for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name != word))


@functools.lru_cache(maxsize=1)
def open_wordnet() -> Any:
    """NLTK's reader of WordNet, opened once.

    Raises:
        InputError: WordNet's data are not installed.
    """
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise InputError(
            f"WordNet's data, which the caption augmentation (eda: True) needs, are not installed: run  {DOWNLOAD}  "
            "once (NLTK_DATA names the folder), or name a JSON table of synonyms by the key 'synonyms' of the YAML"
        ) from error
    return wordnet


def require_wordnet() -> None:
    """Load WordNet now.

    Raises:
        InputError: its data are not installed.
    """
    open_wordnet()


def read_synonyms(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read `{word: [synonym, ...]}`.

    Raises:
        DatasetError: the file is missing or no JSON.
        InputError: it holds something else.
    """
    from tbps_common.datasets import read_json

    table = read_json(path)
    if not isinstance(table, dict):
        raise InputError(f"{os.fspath(path)} must hold an object of word: [synonyms], not a {type(table).__name__}")
    for word, found in table.items():
        if not isinstance(found, list) or not all(isinstance(synonym, str) and synonym for synonym in found):
            raise InputError(f"{os.fspath(path)}: the synonyms of {word!r} must be a list of non-empty strings")
    return table


class SynonymTable:
    """`synonyms` callable of a JSON table; a class, so that loader processes can receive it."""

    def __init__(self, table: dict[str, list[str]]):
        self._table = table

    def __call__(self, word: str) -> Sequence[str]:
        return self._table.get(word, ())


def synonyms_of(config: dict[str, Any]) -> Callable[[str], Sequence[str]] | None:
    """The `synonyms` callable that a configuration asks for; None means WordNet."""
    path = config.get("synonyms")
    return SynonymTable(read_synonyms(path)) if path else None
