"""The closed vocabulary of the synthetic world."""

import re

from tbps_world.synth.captions import frame_phrases
from tbps_world.synth.dialogues import dialogue_phrases
from tbps_world.synth.edits import edit_phrases
from tbps_world.synth.vocabulary import vocabulary_phrases

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a text; hyphenated words stay whole."""
    return _WORD.findall(text.lower())


def lexicon() -> list[str]:
    """Return every word that any caption, edit or dialogue of any world can use, sorted."""
    phrases = [*vocabulary_phrases(), *frame_phrases(), *edit_phrases(), *dialogue_phrases()]
    slots = re.compile(r"\{\w+\}")
    return sorted({word for phrase in phrases for word in words_of(slots.sub(" ", phrase))})
