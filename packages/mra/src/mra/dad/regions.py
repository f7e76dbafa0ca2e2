"""`mra-dad regions`: the regions that a caption speaks of, found by Grounding DINO, and the SDA files."""

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mra.dad.boxes import filter_boxes
from mra.dad.pack import pack
from mra.dad.work import (
    CAPTIONED,
    REGIONS,
    Process,
    read_input,
    require_images,
    require_model,
    run,
    with_pictures,
)
from tbps_common.errors import InputError
from tbps_common.pipeline.stages import Dropped, Record


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
    require_model("--model", args.model)
    records, source = read_input(Path(args.work), CAPTIONED, "caption")
    records = args.shard.of(records)  # the others need not stay in memory
    require_images(args, records)
    names = ("model", "box_threshold", "text_threshold", "min_side", "overlap", "precision")
    settings = {**{name: getattr(args, name) for name in names}, "input": source}
    status = run(args, REGIONS, records, settings, lambda: _build(args))
    if status == 0 and args.shard.count == 1:
        pack(Path(args.work), Path(args.sda))
    return status


def _build(args: argparse.Namespace) -> Process:
    import torch
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    from mra.dad.models import choose_dtype, load, quiet
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device, on_gpu="fp32")
    with quiet():
        processor: Any = load("--model", args.model, lambda: AutoProcessor.from_pretrained(args.model))
        model: Any = load(
            "--model",
            args.model,
            lambda: AutoModelForZeroShotObjectDetection.from_pretrained(args.model, dtype=dtype, use_safetensors=True),
        )
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

    return with_pictures(args.images, detect)


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
