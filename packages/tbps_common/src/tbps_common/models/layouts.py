"""Layouts of weight files: every package says which files it knows, through the entry-point group `tbps.checkpoints`.

    [project.entry-points."tbps.checkpoints"]
    cmlfa = "cmlfa.layouts:PAPER"

The entry is a `Paper`, in a module that imports nothing heavy: what builds a model is named, and imported when it is needed.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "tbps.checkpoints"


@dataclass(frozen=True)
class Layout:
    """A kind of weight file.

    Attributes:
        name: what such a file is, for people.
        marks: names of tensors that every such file holds; the layout with the most marks wins.
        describe: `module:function` that takes the `Contents` of such a file and gives its `Description`; empty: nothing but
            the shapes can be said.
    """

    name: str
    marks: tuple[str, ...]
    describe: str = ""


@dataclass(frozen=True)
class Paper:
    """What a package knows about weight files.

    Attributes:
        name: of the paper.
        layouts: of its own checkpoints first, then of the models it starts from.
        convert: module with `to_hub` and `encoders`, for `tbps-model convert` and `export`; empty: there are none.
    """

    name: str
    layouts: tuple[Layout, ...]
    convert: str = ""


@dataclass(frozen=True)
class Description:
    """A file beside the model of this package that has its sizes.

    Attributes:
        sizes: name -> value, for people.
        expected: what the model holds, without values.
        found: the file's tensors under the model's names.
        optional: names that may be absent, superfluous or of another shape.
    """

    sizes: Mapping[str, Any]
    expected: "Mapping[str, Tensor]"
    found: "Mapping[str, Tensor]"
    optional: Callable[[str], bool] = lambda name: False


def known_papers() -> list[Paper]:
    """Of all installed packages, by name."""
    return [entry.load() for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]


def match(names: Collection[str], papers: Collection[Paper]) -> tuple[Paper, Layout, float]:
    """The layout that names of tensors belong to, or the nearest one.

    Returns:
        The paper, the layout, and the share of its marks that are there: 1 if it is that layout. Otherwise marks also count if
        a name ends with them, as in a file that holds the model inside another one.
    """
    candidates = [(paper, layout) for paper in papers for layout in paper.layouts]
    held = [pair for pair in candidates if all(mark in names for mark in pair[1].marks)]
    if held:
        return *max(held, key=lambda pair: len(pair[1].marks)), 1.0

    def share(layout: Layout) -> float:
        return sum(any(name.endswith(mark) for name in names) for mark in layout.marks) / len(layout.marks)

    paper, layout = max(candidates, key=lambda pair: share(pair[1]))
    return paper, layout, min(share(layout), 0.99)


def layer_numbers(names: Iterable[str], prefix: str) -> list[int]:
    """The different N of names that begin with `<prefix>N.`, in ascending order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(match[1]) for name in names if (match := pattern.match(name))})
