"""Do edits have the colours of their references? Captions without colours, a pool of plain garments, and the answer."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dp_gen.data.folder import TrainingFolder
from dp_gen.data.layout import FolderLayout
from dp_gen.data.transforms import cut_attribute
from tbps_common.files import write_json, write_text
from tbps_common.images import read_image
from tbps_world.synth.vocabulary import COLOURS

POOL_LABELS = ("uppercloth", "bottomcloth")
POOL_SIZE = 6  # references of each type, so that one in six is right by chance
MEANS_NAME = "colours.json"
_WORD_OF = {word: colour for colour, words in COLOURS.items() for word in words}
_COLOUR = re.compile(rf"\b({'|'.join(sorted(_WORD_OF, key=len, reverse=True))})\b ?", re.IGNORECASE)
_PATTERNED = re.compile("striped|stripy|jacket|windbreaker")


def leave_out_colours(source: Path, out: Path) -> None:
    """Write a training folder whose captions name no colour, so that only the references show them.

    Args:
        source: training folder; its images and masks are linked.
        out: what is there already is kept.
    """
    for layout in (FolderLayout(source, split) for split in ("train", "test")):
        for sample in layout.ids:
            files = [layout.image_path(sample), layout.stem(sample).parent / f"{sample}.npy"]
            told = out / files[0].relative_to(source).with_suffix(".json")
            if told.is_file():
                continue
            told.parent.mkdir(parents=True, exist_ok=True)
            for file in files:
                linked = told.parent / file.name
                if not linked.exists():
                    linked.symlink_to(file.resolve())
            write_json(told, _without_colours(layout.read_info(sample)))
    for path in source.glob("img_ids*.txt"):
        write_text(out / path.name, path.read_text(encoding="utf-8"))


def _without_colours(info: dict[str, Any]) -> dict[str, Any]:
    text, position, segments = "", 0, []
    for segment in sorted(info["segments"], key=lambda segment: segment["start"]):
        text += _colourless(info["description"][position : segment["start"]])
        phrase = _colourless(info["description"][segment["start"] : segment["end"]])
        segments.append({**segment, "start": len(text), "end": len(text) + len(phrase), "phrase": phrase})
        text, position = text + phrase, segment["end"]
    return {**info, "description": text + _colourless(info["description"][position:]), "segments": segments}


def _colourless(text: str) -> str:
    """`An emerald long skirt` -> `A long skirt`."""
    text = _COLOUR.sub("", text)
    return re.sub(r"\b([Aa])n? (?=(\w))", lambda found: f"{found[1]}{'n' if found[2].lower() in 'aeio' else ''} ", text)


def make_pool(source: Path, out: Path) -> None:
    """Cut plain garments of six different colours out of test images, on white: a stand-in for product photographs.

    Args:
        source: training folder whose captions name colours.
        out: receives a subfolder per label, and `colours.json`: the mean colour of each.
    """
    import torch
    from PIL import Image

    folder = TrainingFolder(source, "test")
    found: dict[str, dict[str, tuple[str, Any, list[float]]]] = {label: {} for label in POOL_LABELS}
    for index in reversed(range(len(folder))):  # from the end, so that edits do not get their own garments back
        image, info, seg_map, _ = folder.load(index)
        for segment in info["segments"]:
            label, phrase = segment["label"], segment["phrase"].lower()
            colour = _COLOUR.search(phrase)
            if label not in found or colour is None or _PATTERNED.search(phrase):
                continue
            words = f"{_WORD_OF[colour[1]]} {re.sub(r'^(a pair of|an?|the) ', '', _colourless(phrase))}"
            inside = seg_map == segment["id"]
            mean = image[:, inside].float().mean(dim=1).tolist()
            cut = cut_attribute(image, torch.full_like(image, 255), seg_map, segment["id"], segment["bbox"])
            found[label].setdefault(_WORD_OF[colour[1]], (words, cut, mean))
    means = {}
    for label, garments in found.items():
        for words, cut, mean in _far_apart(list(garments.values()), POOL_SIZE):
            path = out / label / f"{re.sub(r'[^a-z]+', '_', words)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cut.permute(1, 2, 0).numpy()).save(path)
            means[f"{label}/{path.name}"] = mean
    write_json(out / MEANS_NAME, means)


def _far_apart(garments: list[tuple[str, Any, list[float]]], count: int) -> list[tuple[str, Any, list[float]]]:
    """Those whose colours are far from each other, the farthest next."""
    chosen = garments[:1]
    while len(chosen) < min(count, len(garments)):
        taken = np.array([mean for _, _, mean in chosen])
        rest = [one for one in garments if one not in chosen]
        chosen.append(max(rest, key=lambda one: float(np.linalg.norm(taken - one[2], axis=1).min())))
    return chosen


def colours_followed(edits: Path, folder: Path, pool: Path) -> dict[str, float]:
    """Share of edited regions whose mean colour is nearest to that of the given reference, among those of the pool.

    Args:
        edits: what `generate.py` wrote.
        folder: training folder that was edited.
        pool: of `make_pool`.

    Returns:
        `given`: the share; `shuffled`: against the references of other edits; `unedited`: of the originals' regions;
        `chance`; `regions`: how many there are.
    """
    means: dict[str, list[float]] = json.loads((pool / MEANS_NAME).read_text(encoding="utf-8"))
    layout = FolderLayout(folder, "test")
    counted: dict[str, list[tuple[int, int, int]]] = {label: [] for label in POOL_LABELS}
    colours = {label: np.array([mean for name, mean in means.items() if name.startswith(label)]) for label in counted}
    files = {label: [Path(name).name for name in means if name.startswith(label)] for label in counted}
    for line in (edits / "edits.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sample = row["source"]
        ids = {segment["label"]: segment["id"] for segment in layout.read_info(sample)["segments"]}
        mask = np.load(layout.stem(sample).parent / f"{sample}.npy")
        edited, before = (np.asarray(read_image(path)) for path in (edits / row["file"], layout.image_path(sample)))
        for label, reference in zip(row["labels"], row["references"]):
            inside = mask == ids[label]
            now, once = (_nearest(picture[inside].mean(axis=0), colours[label]) for picture in (edited, before))
            counted[label].append((files[label].index(Path(reference).name), now, once))
    rows = [np.array(found) for found in counted.values() if found]
    shuffled = [_by_chance(found[:, 0], found[:, 1], len(colours[label])) for label, found in zip(counted, rows)]
    every = np.concatenate(rows)
    return {
        "given": float((every[:, 0] == every[:, 1]).mean()),
        "shuffled": float(np.average(shuffled, weights=[len(found) for found in rows])),
        "unedited": float((every[:, 0] == every[:, 2]).mean()),
        "chance": float(np.average([1 / len(colours[label]) for label in counted], weights=list(map(len, rows)))),
        "regions": len(every),
    }


def _nearest(colour: np.ndarray, colours: np.ndarray) -> int:
    return int(np.linalg.norm(colours - colour, axis=1).argmin())


def _by_chance(given: np.ndarray, found: np.ndarray, count: int) -> float:
    """Expected share of agreement when the references are dealt out anew."""
    one, other = (np.bincount(places, minlength=count) / len(places) for places in (given, found))
    return float((one * other).sum())
