"""What the READMEs name exists: console commands, flags of theirs, linked files and pictures."""

import re
import shlex
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir())
READMES = [
    ROOT / "README.md",
    ROOT / "docs" / "search.md",
    *(ROOT / "packages" / member / "README.md" for member in MEMBERS),
]
SCRIPTS = {entry.name: entry for member in [*MEMBERS, "tbps_world"] for entry in distribution(member).entry_points}
PREFIX = "(?:" + "|".join(sorted({re.escape(name.partition("-")[0]) for name in SCRIPTS})) + ")"


def command_lines(text: str) -> list[list[str]]:
    """Words of every line of a code block that calls one of our console commands."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(rf"`((?:uv run [^`]*)?{PREFIX}-[^`]*)`", text)
    found = []
    for line in [*lines, *inline]:
        try:
            words = shlex.split(line.removeprefix("$ "))
        except ValueError:
            continue
        start = next(
            (
                place
                for place, (before, word) in enumerate(zip(["", *words], words))
                if before != "--package" and re.fullmatch(rf"{PREFIX}-[a-z0-9-]+", word)
            ),
            None,
        )
        if start is not None:
            found.append(words[start:])
    return found


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_commands_exist(readme: Path) -> None:
    commands = command_lines(readme.read_text(encoding="utf-8"))
    assert commands, f"{readme} shows no command"
    for words in commands:
        assert words[0] in SCRIPTS, f"{readme} names the command {words[0]}"


@pytest.mark.parametrize(
    "name", sorted({words[0] for readme in READMES for words in command_lines(readme.read_text(encoding="utf-8"))})
)
def test_flags_of_the_readmes_are_in_the_commands_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [words for readme in READMES for words in command_lines(readme.read_text(encoding="utf-8"))]
    lines = [words for words in lines if words[0] == name]
    subcommands = {words[1] for words in lines if len(words) > 1 and re.fullmatch(r"[a-z]+", words[1])}
    shown = ""
    for arguments in [["--help"], *([subcommand, "--help"] for subcommand in sorted(subcommands))]:
        with pytest.raises(SystemExit):
            SCRIPTS[name].load()(arguments)
        shown += capsys.readouterr().out
    for words in lines:
        for flag in (word for word in words[1:] if word.startswith("--")):
            assert re.search(rf"{flag}\b", shown), f"{name} has no flag {flag}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_linked_files_exist(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        assert not target or (readme.parent / target).exists(), f"{readme} links to {target}"
    assert "@@" not in text, f"{readme} holds a place that was to be filled in"
