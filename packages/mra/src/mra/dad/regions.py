"""`mra-dad regions`: the regions that a caption speaks of, found by Grounding DINO, and the SDA files."""

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mra.dad.pack import pack
from mra.dad.records import CAPTIONED, MODEL_FILES, REGIONS, PictureProcess, run_on_pictures
from tbps_common.errors import InputError
from tbps_common.pipeline import Dropped, Record
from tbps_common.pipeline.models import choose_dtype, load_model, require_model
from tbps_common.run.device import choose_device

DECIMALS = 4
NO_PHRASE, TOO_SMALL, REPEATED = "no phrase", "too small", "repeated"

Corners = tuple[float, float, float, float]


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status. A whole run writes the SDA files too, a shard does not.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or the model cannot be used.
    """
    if args.pack:
        if args.shard.count > 1:
            raise InputError("--pack reads all shards at once: leave --shard out")
        pack(Path(args.work), Path(args.sda))
        return 0
    require_model("--model", args.model, *MODEL_FILES)
    settings = ("model", "box_threshold", "text_threshold", "min_side", "overlap", "precision")
    status = run_on_pictures(args, CAPTIONED, REGIONS, build, settings=settings, fields=("caption",))
    if status == 0 and args.shard.count == 1:
        pack(Path(args.work), Path(args.sda))
    return status


def build(args: argparse.Namespace) -> PictureProcess:
    """Load the detector; the result finds the regions of a batch of pictures."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device, on_gpu="fp32")
    processor: Any = load_model("--model", args.model, AutoProcessor.from_pretrained)
    loader = AutoModelForZeroShotObjectDetection.from_pretrained
    model: Any = load_model("--model", args.model, loader, dtype=dtype, use_safetensors=True)
    _require_grounding(processor, args.model)
    model.to(device).eval()
    special = set(processor.tokenizer.all_special_tokens)
    longest = getattr(model.config, "max_text_len", processor.tokenizer.model_max_length)

    @torch.inference_mode()
    def detect(batch: list[Record], pictures: list[Any]) -> Sequence[Record | Dropped]:
        texts = [grounding_text(record["caption"]) for record in batch]
        inputs = processor(
            images=pictures, text=texts, return_tensors="pt", padding=True, truncation=True, max_length=longest
        ).to(device, dtype)
        found = processor.post_process_grounded_object_detection(
            model(**inputs),
            inputs["input_ids"],
            threshold=args.box_threshold,
            text_threshold=args.text_threshold,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
        )
        results: list[Record | Dropped] = []
        for record, picture, regions in zip(batch, pictures, found):
            kept, removed = filter_boxes(
                regions["boxes"].float().tolist(),
                regions["scores"].float().tolist(),
                [clean_phrase(phrase, special) for phrase in regions["text_labels"]],
                picture.size,
                min_side=args.min_side,
                overlap=args.overlap,
            )
            results.append({**record, **kept, "removed": dict(Counter(removed))})
        return results

    return detect


def grounding_text(caption: str) -> str:
    """A caption as Grounding DINO was trained on: in lower case, closed by a full stop."""
    return caption.lower().strip().rstrip(".").rstrip() + "."


def clean_phrase(phrase: str, special: set[str]) -> str:
    """A phrase without the marks of the tokenizer: the post-processing keeps [SEP], full stops and the ## of word parts."""
    words = [word.removeprefix("##") for word in phrase.split() if word not in special]
    return " ".join(words).strip(" .,;:")


def _require_grounding(processor: Any, name: str) -> None:
    post_process = getattr(processor, "post_process_grounded_object_detection", None)
    if post_process is None or "text_threshold" not in inspect.signature(post_process).parameters:
        raise InputError(
            f"--model {name} finds objects of given names and cannot tell which words of a caption a box belongs to: "
            "give a Grounding DINO"
        )


def filter_boxes(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    phrases: Sequence[str],
    size: tuple[int, int],
    *,
    min_side: float,
    overlap: float,
) -> tuple[Record, list[str]]:
    """Clip, filter and normalise the boxes of one picture.

    A box goes if it has no phrase, if less of it than `min_side` of the picture's width or height lies inside the
    picture, or if a surer box with the same phrase covers it. Boxes with different phrases may lie over each other.

    Args:
        boxes: left, top, right, bottom in pixels.
        scores: of the boxes.
        phrases: of the boxes.
        size: width and height of the picture.
        min_side: least width and height, as a share of the picture's.
        overlap: intersection over union from which on two boxes with one phrase are one.

    Returns:
        `{"boxes", "logits", "phrases"}`, the surest first, boxes as centre x, centre y, width, height in 0..1 with four
        decimals; and why each of the others was removed.
    """
    width, height = size
    kept: list[tuple[Corners, float, str]] = []
    removed = []
    for number in sorted(range(len(boxes)), key=lambda place: -scores[place]):
        left, top, right, bottom = boxes[number]
        box = (
            min(max(left / width, 0.0), 1.0),
            min(max(top / height, 0.0), 1.0),
            min(max(right / width, 0.0), 1.0),
            min(max(bottom / height, 0.0), 1.0),
        )
        phrase = phrases[number]
        if not phrase:
            removed.append(NO_PHRASE)
        elif not _is_large_enough(box, size, min_side):
            removed.append(TOO_SMALL)
        elif any(phrase == other and intersection_over_union(box, earlier) > overlap for earlier, _, other in kept):
            removed.append(REPEATED)
        else:
            kept.append((box, scores[number], phrase))
    return {
        "boxes": [centre_form(box) for box, _, _ in kept],
        "logits": [round(score, DECIMALS) for _, score, _ in kept],
        "phrases": [phrase for _, _, phrase in kept],
    }, removed


def _is_large_enough(box: Corners, size: tuple[int, int], min_side: float) -> bool:
    """Also for the training, which cuts the rounded sides down to whole pixels and wants at least one."""
    _, _, width, height = centre_form(box)
    return width >= min_side and height >= min_side and int(width * size[0]) >= 1 and int(height * size[1]) >= 1


def centre_form(box: Corners) -> list[float]:
    """Left, top, right, bottom -> centre x, centre y, width, height, with four decimals."""
    left, top, right, bottom = box
    values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return [round(value, DECIMALS) for value in values]


def intersection_over_union(one: Corners, other: Corners) -> float:
    """Of two boxes given by their corners; 0 for boxes without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
