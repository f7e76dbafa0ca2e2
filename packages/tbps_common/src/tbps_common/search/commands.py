"""What `tbps-index`, `tbps-search` and the papers' own commands do once their flags are parsed."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tbps_common.errors import DatasetError
from tbps_common.files import write_json
from tbps_common.images import SUFFIXES, read_image
from tbps_common.report.pictures import Hit as Drawn
from tbps_common.report.pictures import RankedQuery, ranked_list
from tbps_common.search.ann import SMALLEST, build_index, measure_recall
from tbps_common.search.detect import VIDEOS, open_detector
from tbps_common.search.erase import erase
from tbps_common.search.gallery import Hit, list_galleries, move_root, open_gallery
from tbps_common.search.index import Counts, list_pictures, update_gallery
from tbps_common.search.metadata import read_metadata
from tbps_common.search.queries import read_dialogue
from tbps_common.search.retriever import Query, Retriever, open_retriever
from tbps_common.search.search import picture_of
from tbps_common.search.search import search as ask


def index(flags: argparse.Namespace) -> int:
    """Bring a gallery up to date, or delete from it; the last line of output says what was done."""
    if flags.delete:
        removed = erase(flags.out, flags.path, flags.where, from_disk=flags.files)
        print(Counts(removed=removed, total=max(map(len, list_galleries(flags.out)))))
        return 0
    if flags.root:
        move_root(flags.out, flags.root)
        if not flags.images:
            print(Counts(total=max(map(len, list_galleries(flags.out)))))
            return 0
    return run_index(
        flags,
        lambda: open_retriever(flags.model, device=flags.device, trust=flags.trust_checkpoint),
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
    )


def run_index(
    flags: argparse.Namespace, open_model: Callable[[], Retriever], *, batch_size: int | None, num_workers: int
) -> int:
    """Bring a gallery up to date; the last line of output says what was done.

    Args:
        flags: those of `tbps_common.search.options.add_gallery_flags`.
        open_model: called once all else has been checked.
        batch_size: pictures encoded at once, or None for what the model suggests.
        num_workers: threads that read pictures.
    """
    pictures = list_pictures(flags.images, SUFFIXES + VIDEOS if flags.detect else SUFFIXES)
    metadata = read_metadata(flags.metadata) if flags.metadata else None
    if "://" in flags.out or os.path.exists(flags.out):
        list_galleries(flags.out, empty=True)  # before the model is loaded, so that a wrong place is reported at once
    model = open_model()
    if model.note:
        print(f"note: {model.note}")
    detector = None
    if flags.detect:
        detector = open_detector(
            flags.detect,
            device=str(model.device),
            score=flags.detect_score,
            margin=flags.detect_margin,
            smallest=flags.detect_min,
            fps=flags.fps,
        )
    counts = update_gallery(
        flags.out,
        model,
        pictures,
        detector=detector,
        metadata=metadata,
        shard=flags.shard,
        half=flags.half,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    if flags.ann and counts.total < SMALLEST:
        print(f"note: no index for --ann: it pays from {SMALLEST} pictures on, exact search takes milliseconds")
    elif flags.ann:
        gallery = open_gallery(flags.out, model)
        build_index(gallery)
        print(f"index for --ann over {counts.total} pictures; {measure_recall(open_gallery(flags.out, model), model)}")
    print(counts)
    return 0


def search(flags: argparse.Namespace) -> int:
    """Ask a gallery, print the hits, draw them and write them down."""
    image = read_image(flags.image, as_shown=True) if flags.image else None
    dialogue = read_dialogue(flags.dialogue) if flags.dialogue else ()
    return run_search(
        flags,
        lambda: open_retriever(flags.model, device=flags.device, trust=flags.trust_checkpoint),
        Query(flags.text, image, tuple(dialogue)),
        judge=flags.judge,
    )


def run_search(flags: argparse.Namespace, open_model: Callable[[], Retriever], query: Query, *, judge: int = 0) -> int:
    """Search, print, draw, write.

    Args:
        flags: those of `tbps_common.search.options.add_hit_flags`.
        open_model: called once all else has been checked.
        query: what is asked.
        judge: hits that the model's second stage judges.
    """
    list_galleries(flags.gallery)
    model = open_model()
    gallery = open_gallery(flags.gallery, model)
    if model.note:
        print(f"note: {model.note}")
    hits = ask(gallery, model, [query], topk=flags.topk, where=flags.where, ann=flags.ann, judge=judge)[0]
    if not hits:
        print("no picture fits --where" if flags.where else f"{flags.gallery} holds no pictures")
    print_hits(hits)
    if flags.output and hits:
        draw_hits(flags.output, query, hits)
        print(f"wrote {flags.output}")
    if flags.json:
        write_json(flags.json, [as_record(hit) for hit in hits])
        print(f"wrote {flags.json}")
    return 0


def print_hits(hits: Sequence[Hit]) -> None:
    """A line for each hit: rank, score, file, frame and box, metadata."""
    for rank, hit in enumerate(hits, start=1):
        more = [f"frame {hit.frame}"] if hit.frame is not None else []
        more += ["box " + ",".join(map(str, hit.box))] if hit.box is not None else []
        more += [f"{name} {value}" for name, value in hit.data.items() if value is not None]
        print("  ".join([f"{rank:3d}", f"{hit.score:7.4f}", hit.shown_path, *more]))


def draw_hits(file: str | Path, query: Query, hits: Sequence[Hit]) -> None:
    """The hits as a picture."""
    text = query.text or " ".join(
        message["value"] for messages in query.dialogue for message in messages if message["from"] == "user"
    )
    ranked_list(file, [RankedQuery(text=text, image=query.image, hits=[Drawn(_shown(hit), hit.score) for hit in hits])])


def _shown(hit: Hit) -> Image.Image | str:
    try:
        return picture_of(hit)
    except DatasetError:
        return hit.path  # drawn as missing


def as_record(hit: Hit) -> dict[str, Any]:
    """A hit as JSON has it; times in ISO 8601."""
    record = asdict(hit)
    record["path"] = hit.shown_path
    plain = (str, int, float, type(None))
    record["data"] = {
        name: value if isinstance(value, plain) else value.isoformat() for name, value in hit.data.items()
    }
    return record
