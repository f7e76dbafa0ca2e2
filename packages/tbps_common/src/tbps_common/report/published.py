"""Published results beside measured ones: the rows are in each package's `published.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prettytable import PrettyTable


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table of results.

    Attributes:
        dataset: name of the data set, as the evaluation file has it; always its test split.
        task: which task of the evaluation (`t2i`, `com`, ...).
        queries: size of the test set; a row is compared with evaluations of exactly this size.
        gallery: likewise.
        metrics: name -> percent.
        source: where the numbers stand.
        weights: which weights gave them.
        protocol: what of the evaluation decides them.
    """

    dataset: str
    task: str
    queries: int
    gallery: int
    metrics: Mapping[str, float]
    source: str
    weights: str
    protocol: str


def compare_with_published(
    rows: Sequence[PublishedRow],
    *,
    dataset: str,
    split: str,
    metrics: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The rows that belong to an evaluation, with its differences from them; the entry `published` of an evaluation file.

    Args:
        rows: all rows of the package.
        dataset: of the evaluation.
        split: of the evaluation.
        metrics: task -> metric -> percent.
        counts: `queries` and `gallery`.

    Returns:
        For each row of this data set, size and a measured task: `task`, `source`, `weights`, `protocol`, and `metrics`: for each
        published metric `published`, `difference` (measured minus published, in percent) and, for recalls, `queries`: the
        difference in whole queries.
    """
    size = counts.get("queries"), counts.get("gallery")
    return [
        {
            "task": row.task,
            "source": row.source,
            "weights": row.weights,
            "protocol": row.protocol,
            "metrics": {
                name: _difference(name, float(metrics[row.task][name]), value, row.queries)
                for name, value in row.metrics.items()
            },
        }
        for row in rows
        if split == "test" and row.dataset == dataset and (row.queries, row.gallery) == size and row.task in metrics
    ]


def _difference(name: str, measured: float, published: float, queries: int) -> dict[str, float | int]:
    found = {"published": published, "difference": measured - published}
    if name.startswith("R"):
        found["queries"] = round(measured / 100 * queries) - round(published / 100 * queries)
    return found


def published_report(entries: Sequence[Mapping[str, Any]], limit: float | None) -> tuple[str, int]:
    """What an evaluation command says of the published rows, and its exit status.

    Args:
        entries: of `compare_with_published`.
        limit: of `--require_published`: one row of every compared task must agree with the evaluation, no metric of it
            differing by more than this many percent; None: nothing is required.

    Returns:
        The text, empty if there is nothing to say; and 0, or 1 if the requirement is not met.
    """
    parts = []
    for entry in entries:
        table = PrettyTable(["metric", "published", "here", "difference", "queries"], align="r")
        for name, found in entry["metrics"].items():
            here = found["published"] + found["difference"]
            queries = f"{found['queries']:+d}" if "queries" in found else "-"
            table.add_row([name, f"{found['published']:.2f}", f"{here:.2f}", f"{found['difference']:+.2f}", queries])
        parts.append(
            f"Published ({entry['task']}): {entry['source']}\nweights: {entry['weights']}; {entry['protocol']}\n{table}"
        )
    if limit is None:
        return "\n".join(parts), 0
    largest: dict[str, float] = {}
    for entry in entries:
        worst = max(abs(found["difference"]) for found in entry["metrics"].values())
        largest[entry["task"]] = min(worst, largest.get(entry["task"], worst))
    wrong = [f"{task} by up to {worst:.2f}" for task, worst in largest.items() if worst > limit]
    if not entries:
        verdict = "no published row belongs to a data set of this name and size, so nothing could be compared"
    elif wrong:
        verdict = f"differs from every published row: {', '.join(wrong)} percent, more than {limit:g}"
    else:
        verdict = f"agrees with a published row within {limit:g} percent"
    return "\n".join([*parts, f"--require_published {limit:g}: {verdict}"]), int(bool(wrong) or not entries)
