"""`tbps-compare`: several models asked the same queries on one gallery, with intervals over the persons asked for.

Queries of each kind are a task of their own. All metrics come from `tbps_common.ranking.evaluate_rows`; a gallery may be larger
than memory.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prettytable import PrettyTable
from torch import Tensor

from tbps_common.bench.timer import measure
from tbps_common.errors import InputError
from tbps_common.files import write_json, write_text
from tbps_common.ranking import best_of_rows, evaluate_rows
from tbps_common.report import cmc_curve
from tbps_common.run.progress import progress_bar
from tbps_common.search.gallery import (
    Gallery,
    check_filter,
    explained,
    feature_blocks,
    hits_of,
    list_galleries,
    open_gallery,
)
from tbps_common.search.queries import Asked, read_queries
from tbps_common.search.rank import scores_of
from tbps_common.search.retriever import KINDS, Features, Query, Retriever, encode_queries, open_retriever
from tbps_common.search.search import picture_of

SCHEMA = "tbps-comparison/1"
METRICS = ("R1", "R5", "R10", "mAP", "mINP")
CURVE = 20


# The gallery.


@dataclass(frozen=True)
class Pictures:
    """The pictures of a gallery in the order of their keys, which is the same for all models.

    Attributes:
        keys: of the rows.
        names: stored paths.
        identities: values of the column of identities.
        rows: row numbers in the table of one model, int64 `[N]`.
    """

    keys: list[str]
    names: list[str]
    identities: list[str]
    rows: Tensor


def _pictures(gallery: Gallery, identity: str | None, condition: str | None) -> Pictures:
    if identity is not None and identity not in gallery.columns:
        known = ", ".join(gallery.columns) or "none"
        raise InputError(
            f"--identity {identity} is not a column of {gallery.path} (columns: {known}): index again with --metadata FILE.csv"
        )
    with explained(gallery.path):
        query = gallery.table.search().select(["key", "path", *([identity] if identity else [])]).with_row_id(True)
        fits = f"problem IS NULL AND ({condition})" if condition else "problem IS NULL"
        table = query.where(fits).to_arrow().sort_by("key")
    identities = table[identity].to_pylist() if identity else []
    return Pictures(
        table["key"].to_pylist(),
        table["path"].to_pylist(),
        ["" if value is None else str(value) for value in identities],
        torch.tensor(table["_rowid"].to_pylist(), dtype=torch.int64),
    )


def answers_of(
    asked: Sequence[Asked], gallery: Gallery, pictures: Pictures, identity: str | None
) -> list[frozenset[int]]:
    """Positions of the pictures that answer each query.

    Raises:
        InputError: a query has no answer among the pictures.
    """
    by_name: dict[str, list[int]] = {}
    by_identity: dict[str, list[int]] = {}
    for place, name in enumerate(pictures.names):
        by_name.setdefault(name, []).append(place)
    for place, value in enumerate(pictures.identities):
        by_identity.setdefault(value, []).append(place)
    found = []
    for one in asked:
        if one.identity and identity is None:
            raise InputError(
                f"{one.where} has an identity: name the gallery's column that holds it with --identity COLUMN"
            )
        right = set(by_identity.get(one.identity, ())) if one.identity else set()
        if one.identity and not right:
            raise InputError(f"{one.where}: no picture of {gallery.path} has {identity} = {one.identity}")
        for path in one.answers:
            places = [gallery.stored_path(os.path.join(gallery.root, path)), gallery.stored_path(os.path.abspath(path))]
            there = next((by_name[name] for name in places if name in by_name), None)
            if there is None:
                raise InputError(
                    f"{one.where}: the answer {path} is not among the pictures of {gallery.path}: write it relative to "
                    f"{gallery.root}"
                )
            right.update(there)
        found.append(frozenset(right))
    return found


# One model.


@dataclass(frozen=True)
class Way:
    """One way to put queries to a model.

    Attributes:
        label: added to the model's name.
        asks: what is made of a query; the scores of all are added.
        judge: best pictures that the model's second stage judges.
    """

    label: str = ""
    asks: tuple[Callable[[Query], Query], ...] = (lambda query: query,)
    judge: int = 0


def join_dialogue(query: Query) -> Query:
    """What the user said in a dialogue, as one sentence after the other."""
    said = [
        message["value"].strip() for messages in query.dialogue for message in messages if message["from"] == "user"
    ]
    return Query(" ".join(said))


def _picture_alone(query: Query) -> Query:
    return replace(query, text="")


def _sentence_alone(query: Query) -> Query:
    return replace(query, image=None)


def ways_to_ask(
    model: Retriever, kind: str, *, joined: bool = False, baselines: bool = False, judge: int = 0
) -> list[Way]:
    """How a model can be asked queries of a kind; empty if it cannot.

    Args:
        model: to ask.
        kind: one of `KINDS`.
        joined: a model for sentences may read a dialogue as one text.
        baselines: of a picture and a sentence, also ask with each alone, and add the scores of both.
        judge: pictures for the second stage of a model that has one, beside its ranking without.
    """
    takes = model.queries
    ways = [Way()] if kind in takes else []
    if kind == "dialogue" and "dialogue" not in takes and "text" in takes and joined:
        ways.append(Way("joined dialogue", (join_dialogue,)))
    if kind == "image+text" and baselines:
        alone = {"image": Way("picture alone", (_picture_alone,)), "text": Way("sentence alone", (_sentence_alone,))}
        ways += [way for one, way in alone.items() if one in takes]
        if "image" in takes and "text" in takes:
            ways.append(Way("sum of both", (_picture_alone, _sentence_alone)))
    sentence = kind == "text" or any(way.asks == (join_dialogue,) for way in ways)
    if judge and model.judge is not None and sentence:
        ways += [replace(way, label=f"{way.label} re-ranked {judge}".strip(), judge=judge) for way in ways]
    return ways


@dataclass(frozen=True)
class Measured:
    """One way to ask one model.

    Attributes:
        name: of the model and the way.
        fingerprint: of the model.
        values: `[Q, 5]`, of each query and metric in percent.
        cmc: R@1, R@2, ... in percent.
        encode_ms: per query, with reading its picture.
        search_ms: per query: scoring the whole gallery and ranking.
        peak_mib: above what was in use before; on a GPU its memory, else the process's.
        picture_bytes: features of one picture in the gallery.
    """

    name: str
    fingerprint: str
    values: np.ndarray
    cmc: list[float]
    encode_ms: float
    search_ms: float
    peak_mib: float
    picture_bytes: int


@dataclass(frozen=True)
class Asker:
    """A model, its gallery and the gallery's pictures."""

    model: Retriever
    gallery: Gallery
    pictures: Pictures
    condition: str | None

    def encode(self, asked: Sequence[Asked], change: Callable[[Query], Query]) -> Features:
        """Features of queries."""
        size = self.model.batch_size
        parts = [
            encode_queries(self.model, [change(one.query()) for one in asked[start : start + size]])
            for start in range(0, len(asked), size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scores(self, features: Sequence[Features], queries: Sequence[int]) -> Tensor:
        """Scores `[len(queries), N]` in the order of the pictures, the gallery being read block by block."""
        scores = torch.zeros(len(queries), len(self.pictures.keys), device=self.model.device)
        chosen = [{name: part[list(queries)] for name, part in one.items()} for one in features]
        rows, places = self.pictures.rows.sort()
        for block_rows, block in feature_blocks(self.gallery, self.condition):
            columns = places[torch.searchsorted(rows, block_rows)].to(scores.device)
            for one in chosen:
                scores[:, columns] += scores_of(self.gallery.features, one, block, self.model.device)
        return scores

    def judge(self, queries: Sequence[Query], scores: Tensor, count: int) -> Tensor:
        """The scores with the best pictures of each query in the order of the second stage, before all others."""
        assert self.model.judge is not None
        best_scores, best = best_of_rows(scores, count)
        bar = progress_bar(len(queries), unit="query", desc="second stage")
        for row, query in enumerate(queries):
            hits = hits_of(self.gallery, self.pictures.rows[best[row].cpu()].tolist(), best_scores[row].tolist())
            with torch.inference_mode():
                judged = self.model.judge(
                    query, [picture_of(hit) for hit in hits], best_scores[row].cpu(), float(scores[row].min())
                )
            order = best[row][judged.sort(descending=True, stable=True).indices.to(best.device)]
            above = torch.arange(len(hits), 0, -1, device=scores.device)
            scores[row, order] = best_scores[row, 0] + above
            bar.update()
        bar.close()
        return scores


def asker_of(path: str, model: Retriever, *, identity: str | None = None, where: str | None = None) -> Asker:
    """A model with what it indexed.

    Args:
        path: of the gallery.
        model: that indexed pictures into it.
        identity: column of the metadata that says who is who.
        where: SQL condition on the columns.

    Raises:
        InputError: there is no such gallery or column, `where` is no condition, or no picture fits it.
    """
    gallery = open_gallery(path, model)
    condition = check_filter(gallery, where)
    pictures = _pictures(gallery, identity, condition)
    if not pictures.keys:
        raise InputError(f"{path} holds no pictures of {model.name}" + (" that fit --where" if condition else ""))
    return Asker(model, gallery, pictures, condition)


def evaluate(asker: Asker, asked: Sequence[Asked], answers: Sequence[frozenset[int]], way: Way) -> Measured:
    """Ask a model in one way, and measure.

    Args:
        asker: the model and its gallery.
        asked: queries of one kind.
        answers: positions of the right pictures of each query.
        way: how to ask.
    """
    values = np.empty((len(asked), len(METRICS)))
    cmc = np.zeros(CURVE)
    times: list[float] = []

    def run() -> None:
        times.append(time.perf_counter())
        features = [asker.encode(asked, change) for change in way.asks]
        times.append(time.perf_counter())
        for group in _without_overlap(answers):
            labels: dict[frozenset[int], int] = {}
            wanted = [labels.setdefault(answers[query], len(labels)) for query in group]
            owners = torch.full((len(asker.pictures.keys),), -1)
            for right, label in labels.items():
                owners[list(right)] = label
            result = evaluate_rows(partial(rows, features, group), wanted, owners, topk=0, max_rank=CURVE)
            reached = [(result.first_rank <= rank).double() for rank in (1, 5, 10)]
            values[group] = 100 * torch.stack([*reached, result.ap, result.inp], dim=1).numpy()
            cmc[:] += result.cmc.double().numpy() * len(group) / len(asked)
        times.append(time.perf_counter())

    def rows(features: Sequence[Features], group: Sequence[int], start: int, stop: int) -> Tensor:
        scores = asker.scores(features, group[start:stop])
        if way.judge:
            scores = asker.judge([way.asks[0](asked[query].query()) for query in group[start:stop]], scores, way.judge)
        return scores

    asker.encode(asked[:1], way.asks[0])  # what a model prepares for its first query is not the query's time
    cost = measure({"": run}, repeats=1, warm_up=False, device=asker.model.device)[""]
    columns = [asker.gallery.table.schema.field(one.name).type for one in asker.gallery.features]
    return Measured(
        f"{asker.model.name}, {way.label}" if way.label else asker.model.name,
        asker.model.fingerprint,
        values,
        cmc.tolist(),
        1000 * (times[1] - times[0]) / len(asked),
        1000 * (times[2] - times[1]) / len(asked),
        cost.peak_mib,
        sum(column.list_size * column.value_type.bit_width // 8 for column in columns),
    )


def _without_overlap(answers: Sequence[frozenset[int]]) -> list[list[int]]:
    """Queries in groups, so that within a group two queries have the same answers or none in common."""
    groups: list[tuple[set[int], list[int]]] = []
    place_of: dict[frozenset[int], int] = {}
    for query, right in enumerate(answers):
        place = place_of.get(right)
        if place is None:
            place = next((number for number, (used, _) in enumerate(groups) if used.isdisjoint(right)), len(groups))
            place_of[right] = place
            if place == len(groups):
                groups.append((set(), []))
            groups[place][0].update(right)
        groups[place][1].append(query)
    return [queries for _, queries in groups]


# The comparison.


def bootstrap(values: np.ndarray, persons: Sequence[str], *, resamples: int, seed: int) -> np.ndarray:
    """Means over all queries of persons drawn with replacement (a cluster bootstrap).

    The same persons are drawn for the same `persons`, `resamples` and `seed`, so the results of two models are paired.

    Args:
        values: `[Q, M]`.
        persons: of each query.
        resamples: how often persons are drawn.
        seed: of the draws.

    Returns:
        `[resamples, M]`.
    """
    names, codes = np.unique(np.asarray(persons), return_inverse=True)
    sizes = np.bincount(codes)
    sums = np.stack([np.bincount(codes, weights=column) for column in values.T], axis=1)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    for row in range(resamples):
        drawn = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        means[row] = drawn @ sums / (drawn @ sizes)
    return means


def compare(flags: argparse.Namespace) -> int:
    """Ask all models, print and write what comes out."""
    asked = read_queries(flags.queries)
    if len({one.person for one in asked}) < 2:
        raise InputError(f"--queries {flags.queries} asks for one person only: intervals need at least two")
    list_galleries(flags.gallery)
    os.makedirs(flags.out, exist_ok=True)
    askers = _open_all(flags)
    first = askers[0]
    answers = answers_of(asked, first.gallery, first.pictures, flags.identity)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "pictures": len(first.pictures.keys),
        "settings": {
            name: getattr(flags, name)
            for name in ("identity", "where", "join_dialogue", "by_rounds", "baselines", "judge", "resamples", "seed")
        },
        "tasks": {},
    }
    tables = []
    for kind in KINDS:
        places = [place for place, one in enumerate(asked) if one.kind == kind]
        rounds = max((len(asked[place].dialogue) for place in places), default=0)
        if not places:
            continue
        for last in range(1, rounds + 1) if flags.by_rounds and rounds else [rounds]:
            task = f"{kind}, {last} round{'s' * (last > 1)}" if flags.by_rounds and rounds else kind
            chosen = [replace(asked[at], dialogue=asked[at].dialogue[:last]) for at in places]
            entries: list[Measured] = []
            for asker in askers:
                ways = ways_to_ask(
                    asker.model, kind, joined=flags.join_dialogue, baselines=flags.baselines, judge=flags.judge
                )
                if not ways:
                    print(f"{task}: left out {asker.model.name}, which does not take {KINDS[kind]}")
                for way in ways:
                    entries.append(evaluate(asker, chosen, [answers[at] for at in places], way))
                    print(f"{task}: {entries[-1].name} done", flush=True)
            if not entries:
                raise InputError(
                    f"none of the models takes {KINDS[kind]}: name one that does, or see --join-dialogue and --baselines"
                )
            persons = [one.person for one in chosen]
            document["tasks"][task] = _summary(entries, persons, resamples=flags.resamples, seed=flags.seed)
            tables.append(_tables(task, document["tasks"][task]))
            print(f"\n{tables[-1]}\n", flush=True)
            curves = {entry.name: entry.cmc[: len(first.pictures.keys)] for entry in entries}
            cmc_curve(Path(flags.out, f"cmc_{task.replace(', ', '_').replace(' ', '_')}.png"), curves, title=task)
    write_json(Path(flags.out, "comparison.json"), document)
    write_text(Path(flags.out, "comparison.txt"), "\n\n".join(tables) + "\n")
    print(f"wrote {Path(flags.out, 'comparison.json')}, comparison.txt and cmc_*.png beside it")
    return 0


def _open_all(flags: argparse.Namespace) -> list[Asker]:
    askers: list[Asker] = []
    for name in flags.model:
        model = open_retriever(name, device=flags.device, trust=flags.trust_checkpoint)
        # Who is who is read once: a column may have been written for the first model's pictures only.
        asker = asker_of(flags.gallery, model, identity=None if askers else flags.identity, where=flags.where)
        if askers and asker.pictures.keys != askers[0].pictures.keys:
            odd = sorted(set(asker.pictures.keys) ^ set(askers[0].pictures.keys))[0]
            raise InputError(
                f"{flags.gallery} holds other pictures of {name} than of {askers[0].model.name}, such as {odd}: index the same "
                "pictures with both"
            )
        if model.note:
            print(f"note: {name}: {model.note}")
        askers.append(asker)
    return askers


def _summary(entries: Sequence[Measured], persons: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    drawn = [bootstrap(entry.values, persons, resamples=resamples, seed=seed) for entry in entries]
    models = []
    for entry, means in zip(entries, drawn):
        against = None if entry is entries[0] else _intervals(entry.values - entries[0].values, means - drawn[0])
        models.append(
            {
                "name": entry.name,
                "fingerprint": entry.fingerprint,
                "metrics": _intervals(entry.values, means),
                "difference": against,
                "cmc": entry.cmc,
                "encode_ms": entry.encode_ms,
                "search_ms": entry.search_ms,
                "peak_mib": entry.peak_mib,
                "picture_bytes": entry.picture_bytes,
            }
        )
    return {"queries": len(persons), "persons": len(set(persons)), "models": models}


def _intervals(values: np.ndarray, means: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean of each metric, and the bounds between which 95 % of the resampled means lie."""
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        name: {"value": float(value), "low": float(bottom), "high": float(top)}
        for name, value, bottom, top in zip(METRICS, values.mean(axis=0), low, high)
    }


def _tables(task: str, summary: dict[str, Any]) -> str:
    names = [f"R@{name[1:]}" if name[0] == "R" else name for name in METRICS]
    results = PrettyTable(["model", *names, "encode ms", "search ms", "MiB", "bytes/picture"], align="r")
    differences = PrettyTable(["difference", *names], align="r")
    results.align["model"] = differences.align["difference"] = "l"
    for entry in summary["models"]:
        costs = [f"{entry[name]:.1f}" for name in ("encode_ms", "search_ms", "peak_mib")]
        results.add_row([entry["name"], *_cells(entry["metrics"], "{:.2f}"), *costs, entry["picture_bytes"]])
        if entry["difference"]:
            differences.add_row([entry["name"], *_cells(entry["difference"], "{:+.2f}")])
    head = f"{task}: {summary['queries']} queries for {summary['persons']} persons; in brackets 95 % intervals over persons"
    if not differences.rows:
        return f"{head}\n{results}"
    return f"{head}\n{results}\nminus {summary['models'][0]['name']}, query by query:\n{differences}"


def _cells(metrics: dict[str, dict[str, float]], form: str) -> list[str]:
    return [
        f"{form.format(one['value'])} [{form.format(one['low'])}, {form.format(one['high'])}]"
        for one in metrics.values()
    ]
