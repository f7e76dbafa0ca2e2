"""What a gallery costs: writing, exact search, search through the index, an update; beside faiss.

  python benchmarks/bench_gallery.py --rows 1000000 --shape 512
  python benchmarks/bench_gallery.py --rows 100000 --shape 32,256

Features are made up: persons of eight pictures each around random centres. Every search is timed in a process of its own,
so that its peak memory is its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from tbps_common.bench.timer import measure
from tbps_common.search.ann import build_index
from tbps_common.search.gallery import create_gallery, list_galleries, merge
from tbps_common.search.rank import rank
from tbps_common.search.retriever import Feature, Retriever

BLOCK = 4096  # as many pictures as tbps-index commits at once


def main() -> None:
    """Write a gallery, then search it in child processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shape", default="512", help="D, or T,D")
    parser.add_argument("--out", default="bench.lance", help="folder to write; it is replaced, and removed at the end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    shape = tuple(int(size) for size in flags.shape.split(","))
    if flags.task:
        print(json.dumps(task(flags.task, flags, shape)))
        return
    size = flags.rows * int(np.prod(shape)) * 4 / 2**30
    print(f"{flags.rows} pictures, features {list(shape)}, float32, {size:.2f} GiB; {flags.threads} threads")
    shutil.rmtree(flags.out, ignore_errors=True)
    for name in ("write", "search 1", "search 64", "faiss 1", "faiss 64", "ann", "update"):
        if name.startswith("faiss") and len(shape) > 1:
            continue  # faiss knows no mean of the best k tokens
        command = [sys.executable, __file__, "--task", name, "--rows", str(flags.rows), "--shape", flags.shape]
        done = subprocess.run(
            [*command, "--out", flags.out, "--threads", str(flags.threads)],
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},  # as all commands do on a machine without a GPU
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:10s}", "  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    shutil.rmtree(flags.out)


def task(name: str, flags: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, float]:
    """One measurement."""
    if name == "write":
        wall, cpu = np.sum([write(flags, shape, block) for block in blocks(flags.rows, shape)], axis=0).tolist()
        size = sum(path.stat().st_size for path in Path(flags.out).rglob("*") if path.is_file()) / 2**20
        return {"seconds": wall, "CPU seconds": cpu, "MiB on disk": size}
    if name == "update":
        changed = flags.rows // 100
        rng = np.random.default_rng(9)
        block = (np.sort(rng.choice(flags.rows, changed, replace=False)), persons(rng, changed, shape))
        wall, cpu = write(flags, shape, block)
        return {"pictures": changed, "seconds": wall, "CPU seconds": cpu}
    (gallery,) = list_galleries(flags.out)
    kind, _, count = name.partition(" ")
    query = queries(flags, shape, int(count or 64))
    if kind == "faiss":
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(flags.threads)
        flat = faiss.IndexFlatIP(shape[0])
        for _, block in blocks(flags.rows, shape):
            flat.add(block)
        return cost(lambda: flat.search(query["feature"].numpy(), 10))
    if kind == "search":
        return cost(lambda: rank(gallery, query, 10))
    start = time.perf_counter()
    build_index(gallery)
    built = time.perf_counter() - start
    exact = rank(gallery, query, 10)[1].tolist()
    result = {"build seconds": built}
    one = {"feature": query["feature"][:1]}
    for candidates in (100, 1000):
        found = rank(gallery, query, 10, ann=candidates)[1].tolist()
        share = sum(len(set(a) & set(b)) for a, b in zip(exact, found)) / sum(map(len, exact))
        result[f"recall@10 of {candidates}"] = share
        result[f"seconds of {candidates}"] = cost(partial(rank, gallery, one, 10, ann=candidates))["seconds"]
    return result


def cost(run: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds, and MiB above what was in use before."""
    found = measure({"run": run}, repeats=3)["run"]
    return {"seconds": found.wall_s, "CPU seconds": found.cpu_s, "MiB": found.peak_mib}


def blocks(rows: int, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and features of all pictures, some at a time."""
    for number, start in enumerate(range(0, rows, BLOCK)):
        stop = min(start + BLOCK, rows)
        yield np.arange(start, stop), persons(np.random.default_rng(number), stop - start, shape)


def persons(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit-norm features of pictures, eight of a person."""
    centres = rng.standard_normal((-(-count // 8), *shape), dtype=np.float32)
    features = np.repeat(centres, 8, axis=0)[:count] + 0.7 * rng.standard_normal((count, *shape), dtype=np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def queries(flags: argparse.Namespace, shape: tuple[int, ...], count: int) -> dict[str, torch.Tensor]:
    """Noisy features of persons of the gallery: vectors."""
    _, block = next(blocks(flags.rows, shape))
    chosen = torch.from_numpy(block[:: max(1, len(block) // count)][:count].copy())
    if len(shape) > 1:
        chosen = chosen.mean(dim=1)
    noise = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)) * chosen.norm() / len(chosen) ** 0.5
    return {"feature": normalize(chosen + 0.7 * noise / chosen.shape[-1] ** 0.5, dim=1)}


def write(
    flags: argparse.Namespace, shape: tuple[int, ...], block: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """Insert or replace rows in one commit; returns the wall and CPU seconds of the commit."""
    numbers, features = block
    gallery = create_gallery(flags.out, model(shape), ".")
    paths = [f"camera_{number % 7}/{number:08d}.jpg" for number in numbers.tolist()]
    columns: dict[str, Any] = {"key": paths, "path": paths}
    for item in gallery.table.schema:
        if item.name in ("feature", "ann"):
            values = features.mean(axis=1) if item.name == "ann" else features
            columns[item.name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=item.type)
        elif item.name not in columns:
            filled = 1 if item.name in ("size", "mtime_ns") else None
            columns[item.name] = pa.array([filled] * len(paths), item.type)
    table = pa.table(columns, schema=gallery.table.schema)
    start, cpu = time.perf_counter(), time.process_time()
    merge(gallery, table)
    return time.perf_counter() - start, time.process_time() - cpu


def model(shape: tuple[int, ...]) -> Retriever:
    """A retriever whose features are given."""

    def nothing(*_: Any) -> Any:
        raise NotImplementedError("features are made up")

    feature = Feature("feature", shape) if len(shape) == 1 else Feature("feature", shape, reduce="topk_mean")
    return Retriever("bench:", ("text",), "b" * 64, (feature,), torch.device("cpu"), nothing, nothing, nothing)


if __name__ == "__main__":
    main()
