"""Where a caption names hair, upper clothing, lower clothing and so on: head nouns from a word list.

The training uses the end of a phrase only; its start is found by walking left over the words that belong to it.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from tbps_common.datasets import read_json
from tbps_common.errors import DatasetError

Lexicon = dict[str, frozenset[tuple[str, ...]]]
"""Head nouns of each type, as lower-case words."""

_WORD = re.compile(r"[^\W\d_](?:[\w'’-]*[\w])?")
_LONGEST_PHRASE = 7

# A noun phrase begins after one of these: prepositions, verbs of wearing, conjunctions, pronouns.
_BEFORE = frozenset(
    "with in on of at by to from over under beneath above below against behind around for as like than and or but while "
    "who whom whose which that where when is are was were be being been am has have had having wears wear wearing wore "
    "dressed dons donning sporting sports carries carrying holds holding pulled paired matched matching plus also it he "
    "she they him them there this these those no not without".split()
)
_DETERMINERS = frozenset("a an the his her their its some two one".split())
_GROUPS = frozenset("pair pairs set".split())
_COLOURS = frozenset(
    "black white grey gray red blue green yellow pink orange purple brown beige tan khaki navy cream gold golden silver "
    "blonde blond maroon teal violet dark light pale bright striped plaid checked checkered patterned".split()
)


def load_lexicon(extra: str | None = None) -> Lexicon:
    """The package's word lists, and those of a JSON file `{"type": ["word", "two words", ...], ...}` added to them.

    Raises:
        DatasetError: the file is missing, or not of that form.
    """
    words = _words(read_json(str(files("dp_gen.segmentation") / "nouns.json")), "the package's nouns.json")
    for label, nouns in (_words(read_json(extra), extra) if extra else {}).items():
        words[label] = words.get(label, frozenset()) | nouns
    return words


def _words(content: object, file: str) -> Lexicon:
    if not isinstance(content, dict) or not all(
        isinstance(nouns, list) and all(isinstance(noun, str) and _split(noun) for noun in nouns)
        for nouns in content.values()
    ):
        raise DatasetError(
            f'--lexicon {Path(file).name} must hold {{"type": ["word", ...], ...}} with words of letters'
        )
    return {str(label): frozenset(_split(noun) for noun in nouns) for label, nouns in content.items()}


def _split(text: str) -> tuple[str, ...]:
    return tuple(match[0].lower() for match in _WORD.finditer(text))


def find_phrases(caption: str, lexicon: Mapping[str, frozenset[tuple[str, ...]]]) -> dict[str, tuple[int, int]]:
    """Start and end of the first phrase of each type that the caption names, in characters.

    A noun right before another head noun only describes it ("suit pants", "dress shirt"), so the last one counts.
    """
    words = [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(caption)]
    heads = _heads(words, caption, lexicon)
    found: dict[str, tuple[int, int]] = {}
    for first, last, label in heads:
        if label not in found:
            found[label] = (words[_phrase_start(words, caption, first)][1], words[last][2])
    return found


def _heads(
    words: Sequence[tuple[str, int, int]], caption: str, lexicon: Mapping[str, frozenset[tuple[str, ...]]]
) -> list[tuple[int, int, str]]:
    """First word, last word and type of every head noun, in the order of the caption."""
    longest = max((len(noun) for nouns in lexicon.values() for noun in nouns), default=0)
    heads: list[tuple[int, int, str]] = []
    position = 0
    while position < len(words):
        match = None
        for length in range(min(longest, len(words) - position), 0, -1):
            text = tuple(word for word, _, _ in words[position : position + length])
            label = next((label for label, nouns in lexicon.items() if text in nouns), None)
            if label is not None and _joined(words, caption, position, position + length - 1):
                match = (position, position + length - 1, label)
                break
        if match is None or _no_garment(words, match):
            position += 1
            continue
        if heads and heads[-1][1] == position - 1 and _joined(words, caption, position - 1, position):
            match = (heads.pop()[0], *match[1:])
        heads.append(match)
        position = match[1] + 1
    return heads


def _no_garment(words: Sequence[tuple[str, int, int]], match: tuple[int, int, str]) -> bool:
    """`on top`, `top of`: a place."""
    first, last, _ = match
    if words[first][0] != "top" or first != last:
        return False
    return (first > 0 and words[first - 1][0] == "on") or (last + 1 < len(words) and words[last + 1][0] == "of")


def _phrase_start(words: Sequence[tuple[str, int, int]], caption: str, first: int) -> int:
    """Number of the first word of the noun phrase whose head noun begins at word `first`."""
    start = first
    while start > 0 and first - start < _LONGEST_PHRASE and _joined(words, caption, start - 1, start):
        before = words[start - 1][0]
        if before in _DETERMINERS:
            start -= 1
            break
        if before == "of" and start > 1 and words[start - 2][0] in _GROUPS:
            start -= 2
            continue
        if before == "and" and start > 1 and words[start][0] in _COLOURS and words[start - 2][0] in _COLOURS:
            start -= 2
            continue
        if before in _BEFORE:
            break
        start -= 1
    return start


def _joined(words: Sequence[tuple[str, int, int]], caption: str, first: int, last: int) -> bool:
    """Whether only space separates the words `first` to `last`."""
    return all(not caption[words[n][2] : words[n + 1][1]].strip() for n in range(first, last))
