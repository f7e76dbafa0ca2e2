"""Annotation of the published sizes, and what reading it costs: CPU seconds, and memory of the process and its workers.

`benchmarks/bench_<name>_annotation.py` of each package writes the annotation of its data set with made-up words into a
temporary folder, and hands `compare_readers` two ways of reading it: this package's, and the direct form
(`json.load`, and lists of what is needed). Each is measured in a fresh process.
"""

import argparse
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tbps_common.bench.timer import linux_bytes
from tbps_common.datasets import mals, sda
from tbps_common.files import write_json
from tbps_common.run.arguments import whole_number

BATCH = 4096  # items of which a worker reads the annotation before it says how much memory it has
COLOURS = "black white red blue green grey brown pink yellow purple orange beige navy dark light striped".split()
GARMENTS = (
    "shirt jacket coat jeans trousers skirt shorts dress sweater hoodie vest shoes boots hat bag backpack".split()
)

Reader = Callable[[Path], Sequence[Any]]


def compare_readers(argv: list[str], description: str, records: int, write: Any, forms: dict[str, Reader]) -> int:
    """Parse the flags, write the annotation, measure every form, print a table; returns the exit status.

    Args:
        argv: the command line.
        description: of the command.
        records: published number.
        write: `(folder, records)` writes the annotation.
        forms: name -> function of a module that reads it; item i of what it returns reads record i.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=whole_number(1), default=records, help=f"number of records ({records:,})")
    parser.add_argument("--only", choices=tuple(forms), help="measure one form (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tbps-annotation-") as folder:
        write(Path(folder), args.records)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.json"))
        print(f"{args.records:,} records, {size / 2**20:,.0f} MiB of JSON", flush=True)
        costs = {
            name: in_fresh_process(read, Path(folder)) for name, read in forms.items() if args.only in (None, name)
        }
    print(f"{'':52}" + "".join(f"{name:>16}" for name in costs) + ("     ratio" if len(costs) > 1 else ""))
    for what in next(iter(costs.values())):
        values = [cost[what] for cost in costs.values()]
        ratio = f"{values[0] / values[-1]:10.2f}" if len(values) > 1 and values[-1] else ""
        print(f"{what:52}" + "".join(f"{value:>16.1f}" for value in values) + ratio)
    if args.json:
        write_json(args.json, {"records": args.records, "python": sys.version, "costs": costs})
    return 0


def in_fresh_process(read: Reader, folder: Path) -> dict[str, float]:
    """What `cost` returns, measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(cost, read, folder).result()


def cost(read: Reader, folder: Path) -> dict[str, float]:
    """Read the annotation in this process, then every record of it in a forked and in a spawned loader process."""
    gc.collect()
    before, cpu = private_mib(), time.process_time()
    items = read(folder)
    cpu = time.process_time() - cpu
    gc.collect()
    result = {"reading, CPU s": cpu, "held after reading, MiB": private_mib() - before}
    gc.freeze()  # as before every training
    for method in ("fork", "spawn"):
        loader = DataLoader(
            Reading(items), BATCH, num_workers=1, collate_fn=max, multiprocessing_context=method, shuffle=True
        )
        result[f"private memory of a {method}ed worker after an epoch, MiB"] = list(loader)[-1]
        bare = DataLoader(Reading(range(BATCH)), BATCH, num_workers=1, collate_fn=max, multiprocessing_context=method)
        result[f"  of which a {method}ed worker without annotation has"] = list(bare)[-1]
    return result


class Reading(Dataset[float]):
    """Reads the annotation of items, without their images; a batch is the private MiB of the process that read it."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> list[float]:
        for index in indices:
            self.items[index]
        return [private_mib()]


def private_mib(process: int | str = "self") -> float:
    """MiB that only this process has (USS), on Linux."""
    rollup = f"/proc/{process}/smaps_rollup"
    return sum(linux_bytes(rollup, kind) for kind in ("Private_Clean", "Private_Dirty")) / 2**20


# Annotation with made-up words, in the schema and the size of each data set.


def write_sda(folder: Path, records: int) -> None:
    """The 14 shards of SDA: captions of some 15 words, three to six regions."""
    rng = random.Random(0)
    phrases = [f"a {' '.join(words)}" for words in product(COLOURS, COLOURS, GARMENTS)]

    def record(number: int) -> dict[str, Any]:
        shown = rng.choices(phrases, k=rng.randint(3, 6))
        return {
            "image": f"c_{number // 17_500 * 5000}_{number // 17_500 * 5000 + 5000}/{number}_0.jpg",
            "boxes": [[rng.random() for _ in range(4)] for _ in shown],
            "logits": [rng.random() for _ in shown],
            "phrases": shown,
            "caption": f"a {rng.choice(('man', 'woman'))} is walking down the street wearing {' and '.join(shown)}",
            "image_id": number,
        }

    write_shards(folder / "data/sda", sda.SHARDS, map(record, range(records)), records)


def write_mals(folder: Path, records: int) -> None:
    """The 91 shards of MALS: captions of some 30 words."""
    rng, words = random.Random(0), vocabulary(3000)

    def record(number: int) -> dict[str, Any]:
        shard = f"c_g_a_{number % 44}"
        return {
            "image": f"gene_crop/{shard}/{number}.jpg",
            "image_id": f"{shard}_{number}",
            "caption": f"{' '.join(rng.choices(words, k=rng.randint(22, 38)))}.",
            "label": rng.choices((0, 1, -1), k=27),
        }

    write_shards(folder / "MALS/gene_attrs", mals.SHARDS, map(record, range(records)), records)


def write_syncpr(folder: Path, records: int) -> None:
    """SynCPR's one file: every group has six to seven triplets, every image takes part in several."""
    rng, words = random.Random(0), vocabulary(3000)

    def record(number: int) -> dict[str, Any]:
        group, left, right = number * 177 // 1150, rng.randrange(8), rng.randrange(8)
        stem = f"test{group % 5 + 1}/sub_img"
        captions = captions_of(group)
        return {
            "reference_caption": captions[0],
            "target_caption": captions[1],
            "reference_image_path": f"{stem}/img_left/{group}-{left}_left.png",
            "target_image_path": f"{stem}/img_right/{group}-{right}_right.png",
            "edit_caption": f"Wearing {' '.join(rng.choices(words, k=12))}.",
            "cpr_id": group,
        }

    def captions_of(group: int) -> list[str]:
        if group != last[0]:
            last[:] = [group, [" ".join(rng.choices(words, k=25)) for _ in range(2)]]
        return last[1]

    last: list[Any] = [-1, []]
    write_shards(folder / "SynCPR", ("SynCPR.json",), map(record, range(records)), records)


def write_cuhk(folder: Path, records: int) -> None:
    """CUHK-PEDES' reid_raw.json; `records` are captions of its training split, two of each image."""
    rng, words = random.Random(0), vocabulary(9000)

    def record(number: int) -> dict[str, Any]:
        split = "train" if number < records // 2 else ("val", "test")[number % 2]
        captions = [f"{' '.join(zipf(rng, words, rng.randint(15, 35)))}. " for _ in range(2)]
        return {
            "split": split,
            "captions": captions,
            "file_path": f"{('cam_a', 'CUHK01', 'Market', 'train_query')[number % 4]}/{number:07}.png",
            "processed_tokens": [caption.split() for caption in captions],
            "id": number // 3 + 1,
        }

    images = records // 2 + 2 * (records // 22)
    (folder / "CUHK-PEDES/imgs").mkdir(parents=True)
    write_shards(folder / "CUHK-PEDES", ("reid_raw.json",), map(record, range(images)), images)


def vocabulary(size: int) -> list[str]:
    """Words of one to three syllables."""
    syllables = [f"{first}{vowel}" for first, vowel in product("bcdfghklmnprst", "aeiou")]
    words = ("".join(parts) for length in (1, 2, 3) for parts in product(syllables, repeat=length))
    return list(islice(words, size))


def zipf(rng: random.Random, words: list[str], count: int) -> Iterator[str]:
    """Words of which, as in a language, the k-th is about 1 / k as frequent as the first."""
    return (words[int(len(words) ** rng.random()) - 1] for _ in range(count))


def write_shards(folder: Path, names: Sequence[str], records: Iterator[dict[str, Any]], count: int) -> None:
    """Write JSON lists of about equal length, a record at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = -(-count // len(names))
    for name in names:
        with open(folder / name, "w", encoding="utf-8") as file:
            file.write("[")
            for place, record in enumerate(islice(records, per_shard)):
                file.write(f"{', ' if place else ''}{json.dumps(record)}")
            file.write("]")
