"""`mra-dad caption`: one description per picture, by BLIP-2."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mra.dad.work import (
    CAPTIONED,
    FILTERED,
    Process,
    read_input,
    require_images,
    require_model,
    run,
    with_pictures,
)
from tbps_common.pipeline.stages import Dropped, Record

NO_WORDS = "empty caption"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or the model cannot be used.
    """
    require_model("--model", args.model)
    records, source = read_input(Path(args.work), FILTERED)
    records = args.shard.of(records)  # the others need not stay in memory
    require_images(args, records)
    names = ("model", "prompt", "max_tokens", "beams", "precision")
    settings = {**{name: getattr(args, name) for name in names}, "input": source}
    return run(args, CAPTIONED, records, settings, lambda: _build(args))


def _build(args: argparse.Namespace) -> Process:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mra.dad.models import choose_dtype, load, quiet
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device, on_gpu="fp16")
    with quiet():
        processor = load("--model", args.model, lambda: AutoProcessor.from_pretrained(args.model))
        model: Any = load(
            "--model",
            args.model,
            lambda: AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype, use_safetensors=True),
        )
    model.to(device).eval()

    @torch.inference_mode()
    def describe(batch: list[Record], pictures: list[Any]) -> Sequence[Record | Dropped]:
        inputs = processor(images=pictures, text=[args.prompt] * len(batch), return_tensors="pt").to(device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=args.max_tokens, num_beams=args.beams, do_sample=False)
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            {**record, "caption": caption} if caption else Dropped(NO_WORDS)
            for record, caption in zip(batch, (clean(text, args.prompt) for text in texts))
        ]

    return with_pictures(args.images, describe)


def clean(text: str, prompt: str) -> str:
    """A generated text on one line, without the prompt that some language models repeat."""
    words = " ".join(text.split())
    return words.removeprefix(" ".join(prompt.split())).strip()
