"""One tiny world for all tests, and a reader that turns a caption back into attributes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tbps_world.synth.generate import generate
from tbps_world.synth.layouts.registry import LAYOUTS
from tbps_world.synth.vocabulary import SYNONYMS
from tbps_world.synth.world import PRESETS, World


@pytest.fixture(scope="session")
def tiny_world() -> World:
    return World(PRESETS["tiny"])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of preset tiny with all layouts. Tests must not write into it."""
    out = tmp_path_factory.mktemp("world") / "tiny"
    generate(out, PRESETS["tiny"], list(LAYOUTS))
    return out


def _choices(synonyms: dict[str, tuple[str, ...]]) -> tuple[str, dict[str, str]]:
    """A pattern of all synonyms, longest first, and the value that each stands for."""
    values = {word: value for value, words in synonyms.items() for word in words}
    return "|".join(re.escape(word) for word in sorted(values, key=len, reverse=True)), values


def _read(text: str) -> dict[str, str]:
    text = text.lower()
    facts: dict[str, str] = {}

    def look(pattern: str) -> re.Match[str] | None:
        found = [match for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text)]
        assert len(found) <= 1, (text, pattern)
        return found[0] if found else None

    for attribute in ("gender", "age", "build", "accessory"):
        pattern, values = _choices(SYNONYMS[attribute])
        if match := look(pattern):
            facts[attribute] = values[match.group()]
    for thing in ("upper", "lower", "shoes", "bag", "headwear"):
        kinds, kind_values = _choices(SYNONYMS[f"{thing}_type"])
        colours, colour_values = _choices(SYNONYMS[f"{thing}_colour"])
        if match := look(rf"(?:({colours}) )?({kinds})"):
            facts[f"{thing}_type"] = kind_values[match.group(2)]
            if match.group(1):
                facts[f"{thing}_colour"] = colour_values[match.group(1)]
    lengths, length_values = _choices(SYNONYMS["hair_length"])
    colours, colour_values = _choices(SYNONYMS["hair_colour"])
    bald = "|".join(SYNONYMS["hair_length"]["bald"])
    if match := look(rf"({lengths}) (?:({colours}) )?hair|(?P<bald>{bald})"):
        facts["hair_length"] = length_values[match.group("bald") or match.group(1)]
        if match.group(2):
            facts["hair_colour"] = colour_values[match.group(2)]
    return facts


@pytest.fixture(scope="session")
def read_caption() -> Callable[[str], dict[str, str]]:
    """`read_caption(text)`: the attributes a caption states, found by the synonym tables alone."""
    return _read
